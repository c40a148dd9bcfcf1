//! The verbs, one file each.

pub mod agent;
pub mod balance;
pub mod container;
pub mod controller;
pub mod doctor;
pub mod env;
pub mod events;
pub mod exec;
pub mod explain;
pub mod filler;
pub mod host;
pub mod keeper;
pub mod lab;
pub mod logs;
pub mod migrate;
pub mod moves;
pub mod plan;
pub mod ps;
pub mod sim;
pub mod version;
pub mod workload;

use anyhow::{Context, Result};
use godwit_api::client::Client;
use tokio::runtime::Builder;

use crate::args::{Cli, Global, Verb};
use crate::connect;
use crate::printer::Printer;

/// The exit code of a program whose verb did what it was asked for.
pub const DONE: u8 = 0;

/// Runs the verb; returns the exit code. No thread exists yet: the keeper and `lab exec` need that.
pub fn run(cli: Cli, printer: &Printer) -> Result<u8> {
    let Cli { global, verb } = cli;
    if let Verb::Keeper(args) = &verb {
        return Ok(keeper::run(args));
    }
    if let Verb::Filler(args) = &verb {
        return filler::run(args);
    }
    let is_daemon = matches!(verb, Verb::Agent(_) | Verb::Controller(_));
    printer.start_tracing(global.verbose, is_daemon);
    match verb {
        Verb::Lab(verb) => lab::run(&global, printer, verb),
        Verb::Doctor(args) => doctor::run(printer, &args),
        Verb::Sim(args) => sim::run(printer, &args),
        Verb::Workload(command) => workload::run(command),
        Verb::Controller(args) => on_runtime(Builder::new_multi_thread(), controller::run(args)),
        Verb::Agent(args) => on_runtime(Builder::new_multi_thread(), agent::run(args)),
        verb => on_runtime(Builder::new_current_thread(), ask(&global, verb, printer)),
    }
}

fn on_runtime(mut builder: Builder, work: impl Future<Output = Result<u8>>) -> Result<u8> {
    let runtime = builder.enable_all().build().context("cannot start: the system refuses epoll or a thread")?;
    let code = runtime.block_on(work);
    // A thread that still reads standard input is not waited for.
    runtime.shutdown_background();
    code
}

/// The verbs that ask a controller.
async fn ask(global: &Global, verb: Verb, printer: &Printer) -> Result<u8> {
    if let Verb::Version = verb {
        return version::run(global, printer).await;
    }
    let client: Client = connect::client(global)?;
    match verb {
        Verb::Host(verb) => host::run(&client, printer, verb).await,
        Verb::Env(verb) => env::run(&client, printer, verb).await,
        Verb::Explain(args) => explain::run(&client, printer, args).await,
        Verb::Ps(args) => ps::run(&client, printer, args).await,
        Verb::Logs(args) => logs::run(&client, printer, args).await,
        Verb::Exec(args) => exec::run(&client, printer, args).await,
        Verb::Stop(args) => container::stop(&client, printer, args).await,
        Verb::Start(args) => container::start(&client, printer, args).await,
        Verb::Rm(args) => container::remove(&client, printer, args).await,
        Verb::Migrate(args) => migrate::run(&client, printer, args).await,
        Verb::Move(verb) => moves::run(&client, printer, verb).await,
        Verb::Balance(verb) => balance::run(&client, printer, verb).await,
        Verb::Plan(verb) => plan::run(&client, printer, verb).await,
        Verb::Events(args) => events::run(&client, printer, args).await,
        // Run above.
        Verb::Version
        | Verb::Agent(_)
        | Verb::Controller(_)
        | Verb::Doctor(_)
        | Verb::Keeper(_)
        | Verb::Filler(_)
        | Verb::Lab(_)
        | Verb::Sim(_)
        | Verb::Workload(_) => Ok(DONE),
    }
}
