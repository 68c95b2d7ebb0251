//! The RMP from outside: one file per promise.

mod checks;
mod common;
mod history;
mod instructions;
mod races;
mod segments;
