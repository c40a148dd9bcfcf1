//! The command line. Each verb's own arguments are next to the verb.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::verbs;

/// Moves running containers between hosts without stopping them.
#[derive(Debug, Parser)]
#[command(name = "godwit", version, max_term_width = 100, arg_required_else_help = true)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub verb: Verb,
}

/// What every verb takes.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// The controller: unix:/path or https://host:port [env: GODWIT_CONTROLLER]
    #[arg(long, global = true, value_name = "ADDRESS", conflicts_with = "lab")]
    pub controller: Option<String>,
    /// The controller of a lab on this machine [env: GODWIT_LAB]
    #[arg(long, global = true, value_name = "NAME")]
    pub lab: Option<String>,
    /// Where identity.crt, identity.key and ca.crt are, for https [env: GODWIT_IDENTITY]
    #[arg(long, global = true, value_name = "DIRECTORY")]
    pub identity: Option<PathBuf>,
    /// How data is written to standard output
    #[arg(long, global = true, value_enum, default_value_t = Output::Table, value_name = "FORMAT")]
    pub output: Output,
    /// Say nothing on standard error but errors
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// Say more on standard error; twice for everything
    #[arg(short, long, global = true, action = clap::ArgAction::Count, conflicts_with = "quiet")]
    pub verbose: u8,
}

/// A table is for people; JSON has the API's own types, one value each line where it is a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    Table,
    Json,
}

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Hosts: list, show, evacuate, cordon, activate, declare-dead
    #[command(subcommand)]
    Host(verbs::host::HostVerb),
    /// Environments: apply, list, show, delete
    #[command(subcommand)]
    Env(verbs::env::EnvVerb),
    /// List containers
    Ps(verbs::ps::PsArgs),
    /// Tell where a container is and why, which hosts could take it and which not, whether it can move, its last moves
    /// and events
    Explain(verbs::explain::ExplainArgs),
    /// Show what a container wrote
    Logs(verbs::logs::LogsArgs),
    /// Run a program in a container
    Exec(verbs::exec::ExecArgs),
    /// Stop a container; its files stay
    Stop(verbs::container::OneContainer),
    /// Start a container that was stopped or has ended
    Start(verbs::container::OneContainer),
    /// Remove a container with its files and volumes
    Rm(verbs::container::RemoveArgs),
    /// Move a running container to another host
    Migrate(verbs::migrate::MigrateArgs),
    /// Moves: list, show, cancel
    #[command(subcommand)]
    Move(verbs::moves::MoveVerb),
    /// Spread containers and load over the hosts: show, off, advise, automatic, now
    #[command(subcommand)]
    Balance(verbs::balance::BalanceVerb),
    /// What would happen: evacuate, fail, rebalance
    #[command(subcommand)]
    Plan(verbs::plan::PlanVerb),
    /// Show what happened
    Events(verbs::events::EventsArgs),
    /// Many hosts on this machine: up, demo, down, list, exec, kill, start, cut, restore, rate
    #[command(subcommand)]
    Lab(verbs::lab::LabVerb),
    /// Let a fleet of simulated hosts live through failures, growth and evacuations
    Sim(verbs::sim::SimArgs),
    /// Look at what this server has of what a host needs
    Doctor(verbs::doctor::DoctorArgs),
    /// Make this server the one that decides: hosts join it, people ask it
    Controller(verbs::controller::ControllerArgs),
    /// Make this server a host
    Agent(verbs::agent::AgentArgs),
    #[command(hide = true)]
    Keeper(verbs::keeper::KeeperArgs),
    /// The process that fills the memory of a container that has arrived; started by the agent
    #[command(hide = true)]
    Filler(verbs::filler::FillerArgs),
    /// Workloads that check themselves
    #[command(subcommand, hide = true)]
    Workload(godwit_lab::workload::WorkloadCommand),
    /// Show the versions of this program and of the controller
    Version,
}
