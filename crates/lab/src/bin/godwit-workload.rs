//! The workloads alone, as a small program to put into images.
#![forbid(unsafe_code)]

use std::error::Error;
use std::process::ExitCode;

use clap::Parser;
use godwit_lab::workload::{self, WorkloadCommand};

/// Workloads that check themselves, and the clients that check them from outside
#[derive(Parser)]
#[command(name = "godwit-workload", version)]
struct Arguments {
    #[command(subcommand)]
    command: WorkloadCommand,
}

fn main() -> ExitCode {
    workload::run(Arguments::parse().command, &[]).unwrap_or_else(|error| {
        let mut cause: Option<&dyn Error> = Some(&error);
        let mut text = Vec::new();
        while let Some(one) = cause {
            text.push(one.to_string());
            cause = one.source();
        }
        eprintln!("error: {}", text.join(": "));
        ExitCode::from(2)
    })
}
