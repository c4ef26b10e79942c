//! What the interpreter must do, by hand and by values taken from a processor (Intel Xeon, Sapphire Rapids).

mod debugging;
mod flags;
mod machine;
mod memory_forms;
mod modes;
mod real;
mod stack;
mod strings;
