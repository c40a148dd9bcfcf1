//! The `godwit` binary: controller, agent and keeper, and the verbs people use.
//!
//! This page wires. A verb is a file below `verbs/`; it gets its arguments and the [`printer::Printer`], and returns
//! the exit code. Data goes to standard output, talk to standard error. Errors come up to here and are printed once.
#![forbid(unsafe_code)]

mod args;
mod connect;
mod failure;
mod human;
mod names;
mod printer;
mod table;
mod terminal;
mod verbs;

use std::process::ExitCode;

use clap::Parser;

use crate::args::Cli;
use crate::printer::Printer;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let printer = Printer::new(&cli.global);
    match verbs::run(cli, &printer) {
        Ok(code) => ExitCode::from(code),
        Err(error) => failure::report(&printer, &error),
    }
}
