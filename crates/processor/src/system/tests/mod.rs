mod delivery;
mod instructions;
mod machine;
mod transfers;
