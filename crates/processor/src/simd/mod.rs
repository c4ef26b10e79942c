//! x87, MMX, SSE and AVX for the interpreter.

pub mod features;
