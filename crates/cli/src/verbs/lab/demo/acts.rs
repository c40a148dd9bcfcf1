//! The three acts: Redis, PostgreSQL, nginx. Each prepares its data, starts its client, moves its container around
//! the hosts, and asks the client, and the data, what became of them.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use godwit_api::client::{Address, Client};
use godwit_lab::workload;
use godwit_lab::{Lab, Node};
use godwit_model::{Bytes, ContainerName, HostName};

use super::clients::{self, Seen};
use super::pgbench::{self, Bench};
use super::report::{MoveReport, Report};
use super::stage::{self, ENTRANCE, Stage};
use super::{inside, moves};
use crate::failure::Failure;
use crate::human;
use crate::printer::Printer;

/// Where each container begins, and the hosts it is then moved to.
const START: u32 = 1;
const ROUTE: [u32; 3] = [2, 3, 1];
/// Quiet time before the first and after each move, in which a client's ordinary gaps are seen.
const QUIET: Duration = Duration::from_secs(1);
/// Memory that is touched and given back before a move, beside that of the container.
const WARM_BYTES: u64 = 256 << 20;
/// Intervals that clients tell apart, in milliseconds.
const INTERVAL_MS: &str = "50";
const REDIS_MIB: &str = "1024";
/// Fills an allocation class of Redis' allocator; one byte more than fits would take a quarter more memory.
const REDIS_VALUE_BYTES: &str = "65000";
const FILE_BYTES: u64 = 2 << 30;
/// The download lasts this long, unless all moves are over before.
const DOWNLOAD_SECONDS: &str = "240";
/// Filling memory, files and tables, reading and hashing them.
const DATA_LIMIT: Duration = Duration::from_secs(180);

/// A container of the environment that is moved around.
struct Actor {
    name: ContainerName,
    program: &'static str,
    /// A command whose output tells its processes from any others.
    identity: &'static str,
    volume: Option<&'static str>,
}

/// One move and what was seen beside the client.
struct Step {
    done: moves::Done,
    resident_bytes: u64,
    volume_bytes: u64,
    same_process: bool,
    same_address: bool,
}

/// Everything that needs the lab.
struct Act<'a> {
    printer: &'a Printer,
    lab: &'a Lab,
    stage: &'a Stage,
    client: Client,
}

pub async fn play(printer: &Printer, lab: &Lab, stage: &Stage, report: &mut Report) -> Result<()> {
    let client = Client::new(Address::Unix(lab.paths().api_socket()));
    stage::environment(&client, printer, stage).await?;
    let act = Act { printer, lab, stage, client };
    act.redis(report).await?;
    act.postgresql(report).await?;
    act.nginx(report).await
}

fn entrance(port: u16) -> String {
    SocketAddr::from((ENTRANCE.address(), port)).to_string()
}

fn host(number: u32) -> Result<HostName> {
    Ok(HostName::new(Node::Host(number).to_string())?)
}

impl Act<'_> {
    async fn redis(&self, report: &mut Report) -> Result<()> {
        let redis = Actor {
            name: "shop/cache-1".parse()?,
            program: "redis",
            identity: "redis-cli info server | grep -E '^(run_id|process_id):'",
            volume: None,
        };
        self.bring_to_start(&redis.name).await?;
        self.printer.say(format_args!("{}: writing {REDIS_MIB} MiB into Redis", redis.name));
        let address = entrance(6379);
        let data = ["--address", &address, "--mib", REDIS_MIB, "--value-bytes", REDIS_VALUE_BYTES];
        self.workload("redis-fill", &data).await?;

        self.printer.say(format_args!("{}: one connection sends INCR and checks each number", redis.name));
        let argv = ["redis-client", "--address", &address, "--interval-ms", INTERVAL_MS, "--until-stdin-closes"];
        let incrementing = self.start("the Redis client", &argv).await?;
        let steps = self.around(&redis).await?;
        let mut seen = incrementing.report(DATA_LIMIT).await?;
        self.printer.say(format_args!("{}: reading the {REDIS_MIB} MiB again", redis.name));
        let check = self.workload("redis-check", &data).await?;
        seen.errors += check.errors;
        seen.messages.extend(check.messages.iter().cloned());
        self.add(
            report,
            &redis,
            &steps,
            |from, until| clients::seen(&seen, from, until),
            (seen.errors, seen.reconnects),
        );
        self.tell(&seen.messages);
        Ok(())
    }

    async fn postgresql(&self, report: &mut Report) -> Result<()> {
        let postgresql = Actor {
            name: "shop/db-1".parse()?,
            program: "postgresql",
            identity: "psql -U postgres -Atqc 'select pg_postmaster_start_time()'; head -n 1 \"$PGDATA/postmaster.pid\"",
            volume: Some("/var/lib/postgresql/data"),
        };
        self.bring_to_start(&postgresql.name).await?;
        self.printer.say(format_args!("{}: making pgbench's tables", postgresql.name));
        let argv = pgbench::arguments(self.stage, &["-i", "-q", "-s", "10"]);
        let ended = clients::run(self.lab, "pgbench -i", &argv, DATA_LIMIT).await?;
        if !ended.success {
            return Err(Failure::new(format!("pgbench cannot make its tables: {}", ended.talk.join(" | "))).into());
        }

        self.printer.say(format_args!("{}: pgbench works on four connections", postgresql.name));
        let bench = Bench::start(self.lab, self.stage).await?;
        let steps = self.around(&postgresql).await?;
        let mut outcome = bench.end().await?;
        if let Err(error) = self.check_accounts(&postgresql.name, outcome.processed).await {
            outcome.errors += 1;
            outcome.messages.push(format!("{error:#}"));
        }
        // pgbench never connects again: a connection that is lost is an error.
        self.add(report, &postgresql, &steps, |from, until| outcome.seen(from, until), (outcome.errors, 0));
        self.tell(if outcome.errors > 0 { &outcome.messages } else { &[] });
        Ok(())
    }

    /// Each transaction adds one amount to an account, its teller and its branch, and tells the history.
    async fn check_accounts(&self, name: &ContainerName, processed: u64) -> Result<()> {
        let query = "select (select sum(abalance) from pgbench_accounts), (select sum(tbalance) from pgbench_tellers), \
                     (select sum(bbalance) from pgbench_branches), (select sum(delta) from pgbench_history), \
                     (select count(*) from pgbench_history)";
        let command = format!("psql -U postgres -Atqc '{query}' shop");
        let text = inside::shell(&self.client, name, &command, DATA_LIMIT).await?;
        let sums: Vec<&str> = text.trim().split('|').collect();
        match sums.as_slice() {
            [a, b, c, d, count] if a == b && b == c && c == d && *count == processed.to_string() => Ok(()),
            _ => {
                Err(Failure::new(format!("the sums of {processed} transactions do not agree: {}", text.trim())).into())
            }
        }
    }

    async fn nginx(&self, report: &mut Report) -> Result<()> {
        let nginx = Actor {
            name: "shop/web-1".parse()?,
            program: "nginx",
            identity: "cat /run/nginx.pid; grep -lx nginx /proc/[0-9]*/comm 2>/dev/null || true",
            volume: Some("/srv"),
        };
        self.bring_to_start(&nginx.name).await?;
        self.printer.say(format_args!("{}: writing a file of {}", nginx.name, Bytes(FILE_BYTES)));
        let command = format!("head -c {FILE_BYTES} /dev/urandom | tee /srv/file | sha256sum");
        let text = inside::shell(&self.client, &nginx.name, &command, DATA_LIMIT).await?;
        let sha256 = text.split_whitespace().next().context("sha256sum said nothing")?;

        self.printer.say(format_args!("{}: one slow download of the file begins", nginx.name));
        let address = entrance(8080);
        let mut argv = vec!["http-client", "--address", &address, "--path", "/files/file", "--sha256", sha256];
        argv.extend(["--seconds", DOWNLOAD_SECONDS, "--until-stdin-closes", "--interval-ms", INTERVAL_MS]);
        let download = self.start("the download", &argv).await?;
        let steps = self.around(&nginx).await?;
        let seen = download.report(DATA_LIMIT).await?;
        let of_file = |from, until| {
            let seen = clients::seen(&seen, from, until);
            // One request, which must be under way during each move.
            Seen { requests: seen.requests.min(1), ..seen }
        };
        self.add(report, &nginx, &steps, of_file, (seen.errors, seen.reconnects));
        self.tell(&seen.messages);
        Ok(())
    }

    /// Moves a container there where it begins its round, if it is elsewhere.
    async fn bring_to_start(&self, name: &ContainerName) -> Result<()> {
        let start = host(START)?;
        let here = self.client.container(name).await?.host;
        if here.as_ref() != Some(&start) {
            self.printer.say(format_args!("{name}: from {} to {start}, where it begins", human::or_dash(here)));
            moves::to(&self.client, name, &start).await?;
        }
        Ok(())
    }

    /// Moves a container around all hosts.
    async fn around(&self, actor: &Actor) -> Result<Vec<Step>> {
        let mut steps = Vec::new();
        let mut identity = inside::identity(&self.client, &actor.name, actor.identity).await?;
        tokio::time::sleep(QUIET).await;
        for number in ROUTE {
            let resident_bytes = inside::resident_bytes(&self.client, &actor.name).await?;
            let volume_bytes = match actor.volume {
                Some(directory) => inside::file_bytes(&self.client, &actor.name, directory).await?,
                None => 0,
            };
            let address = self.client.container(&actor.name).await?.address;
            warm(resident_bytes + WARM_BYTES);
            let to = host(number)?;
            let done = moves::to(&self.client, &actor.name, &to).await?;
            let summary = done.record.summary.clone().unwrap_or_default();
            self.printer.say(format_args!(
                "{}: {} → {to}: {} in {}, downtime {}",
                actor.name,
                done.record.from,
                Bytes(summary.bytes_sent),
                human::millis(summary.total_ms),
                human::millis(summary.downtime_ms)
            ));
            tokio::time::sleep(QUIET).await;
            let after = self.client.container(&actor.name).await?;
            let found = inside::identity(&self.client, &actor.name, actor.identity).await?;
            steps.push(Step {
                done,
                resident_bytes,
                volume_bytes,
                same_process: found == identity,
                same_address: after.address == address && after.host == Some(to),
            });
            identity = found;
        }
        Ok(steps)
    }

    /// Adds the moves of one container. `seen` is asked for the time from one request to the next.
    fn add(
        &self,
        report: &mut Report,
        actor: &Actor,
        steps: &[Step],
        seen: impl Fn(u64, u64) -> Seen,
        (errors, reconnects): (u64, u64),
    ) {
        for (number, step) in steps.iter().enumerate() {
            let record = &step.done.record;
            let until = steps.get(number + 1).map_or(u64::MAX, |next| next.done.began_ms);
            let seen = seen(step.done.began_ms, until);
            let summary = record.summary.clone().unwrap_or_default();
            report.moves.push(MoveReport {
                container: actor.name.to_string(),
                program: actor.program,
                from: record.from.to_string(),
                to: record.to.to_string(),
                rss_bytes: step.resident_bytes,
                volume_bytes: step.volume_bytes,
                total_ms: summary.total_ms,
                downtime_ms: summary.downtime_ms,
                downtime_parts: summary.downtime_parts,
                client_gap_ms: seen.gap_ms,
                requests: seen.requests,
                errors,
                reconnects,
                bytes_sent: summary.bytes_sent,
                same_process: step.same_process,
                same_address: step.same_address,
            });
        }
    }

    fn tell(&self, messages: &[String]) {
        messages.iter().for_each(|message| self.printer.labelled("client", message));
    }

    fn argv(&self, arguments: &[&str]) -> Vec<String> {
        let program = [self.stage.godwit.to_string_lossy().into_owned(), "workload".to_owned()];
        program.into_iter().chain(arguments.iter().map(|one| (*one).to_owned())).collect()
    }

    async fn start(&self, what: &str, arguments: &[&str]) -> Result<clients::Client> {
        clients::Client::start(self.lab, what, &self.argv(arguments), "connected").await
    }

    /// Runs a workload that ends by itself.
    async fn workload(&self, name: &str, arguments: &[&str]) -> Result<workload::Report> {
        let argv = self.argv(&[&[name], arguments].concat());
        let ended = clients::run(self.lab, name, &argv, DATA_LIMIT).await?;
        let said = || format!("{name} did not report; it said: {}", ended.talk.join(" | "));
        serde_json::from_str(&ended.output).with_context(said)
    }
}

/// Memory that a virtual machine has given back costs ten times as much at its next first touch: what the destination
/// is about to take is taken and given back before, so that not the machine below this one is measured.
fn warm(bytes: u64) {
    std::hint::black_box(vec![1_u8; bytes as usize]);
}
