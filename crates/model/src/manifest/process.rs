//! What runs in a container and how it is watched and ended: command lines, health, restart, signals.

use super::field::{Field, Known};
use super::text;
use crate::container::{HealthCheck, RestartPolicy};

/// Longest time of anything given in a manifest: one day.
const MAX_TIME_MS: u64 = 24 * 60 * 60 * 1000;
/// Shortest time between two health checks.
const MIN_HEALTH_INTERVAL_MS: u64 = 100;
/// Most failures in a row before a container counts as unhealthy.
const MAX_HEALTH_RETRIES: u32 = 100;
/// Time for a container to end before it is killed, if the manifest does not say.
const DEFAULT_STOP_GRACE_MS: u64 = 10_000;

/// Signals by name, without "SIG".
const SIGNALS: [&str; 27] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE", "ALRM", "TERM",
    "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ", "VTALRM", "WINCH", "PWR",
];
/// Highest number of a signal.
const MAX_SIGNAL: u64 = 64;

/// `command` and `entrypoint`: a list as it is, a line split like a shell would. An empty one replaces
/// the image's by nothing.
pub(super) fn argv(field: &Field<'_>) -> Option<Vec<String>> {
    if field.is_list() {
        return field.texts();
    }
    match text::words(&field.text()?) {
        Some(words) => Some(words),
        None => field.error_hint("a quote is not closed", "write the command as a list, one argument per item"),
    }
}

/// `None` if there is no check, or it is switched off.
pub(super) fn health(field: &Field<'_>) -> Option<HealthCheck> {
    let unsupported = [("start_interval", "remove it, interval holds from the start")];
    let keys = ["test", "interval", "timeout", "retries", "start_period", "disable"];
    let known = field.known(&keys, &unsupported)?;
    let time = |key: &str, least: u64, default: u64| match known.get(key) {
        Some(field) => field.duration_ms(least, MAX_TIME_MS),
        None => Some(default),
    };
    let interval_ms = time("interval", MIN_HEALTH_INTERVAL_MS, 30_000);
    let timeout_ms = time("timeout", 1, 30_000);
    let start_period_ms = time("start_period", 0, 0);
    let retries = match known.get("retries") {
        Some(field) => field.number_u32(1, MAX_HEALTH_RETRIES),
        None => Some(3),
    };
    if let Some(disable) = known.get("disable")
        && disable.boolean()?
    {
        return match known.get("test") {
            Some(test) => test.error_hint("a health check that is disabled has a test", "remove test, or disable"),
            None => None,
        };
    }
    let Some(test) = known.get("test") else {
        return field.error_hint("the key \"test\" is missing", "write for example test: [CMD, redis-cli, ping]");
    };
    let argv = health_argv(test)?;
    Some(HealthCheck {
        argv,
        interval_ms: interval_ms?,
        timeout_ms: timeout_ms?,
        start_period_ms: start_period_ms?,
        retries: retries?,
    })
}

fn health_argv(test: &Field<'_>) -> Option<Vec<String>> {
    let shell = |line: String| Some(vec!["/bin/sh".to_owned(), "-c".to_owned(), line]);
    if !test.is_list() {
        return shell(test.filled_text()?);
    }
    let mut words = test.texts()?.into_iter();
    let kind = words.next();
    let rest: Vec<String> = words.collect();
    match (kind.as_deref(), &rest[..]) {
        (Some("NONE"), []) => None,
        (Some("CMD"), [program, ..]) if !program.is_empty() => Some(rest),
        (Some("CMD-SHELL"), [line]) if !line.trim().is_empty() => shell(line.clone()),
        (Some("CMD-SHELL"), [_, _, ..]) => {
            test.error_hint("CMD-SHELL takes one line", "write it as one text, or use CMD with a list of arguments")
        }
        _ => test.error_hint(
            "the test is not one",
            "write [CMD, program, argument, …], [CMD-SHELL, \"a line for the shell\"] or [NONE]",
        ),
    }
}

pub(super) fn restart(field: &Field<'_>) -> Option<RestartPolicy> {
    let value = field.text()?;
    match value.as_str() {
        "no" => return Some(RestartPolicy::No),
        "always" => return Some(RestartPolicy::Always),
        "unless-stopped" => return Some(RestartPolicy::UnlessStopped),
        "on-failure" => return Some(RestartPolicy::OnFailure { max_retries: None }),
        _ => {}
    }
    match value.strip_prefix("on-failure:").map(str::parse) {
        Some(Ok(retries)) if retries > 0 => Some(RestartPolicy::OnFailure { max_retries: Some(retries) }),
        _ => field.error_hint(
            format!("{value:?} is not a restart policy"),
            "write one of: no, always, unless-stopped, on-failure, on-failure:5",
        ),
    }
}

/// As `SIGTERM`, or as a number.
pub(super) fn signal(field: &Field<'_>) -> Option<String> {
    let value = field.text()?;
    if value.parse::<u64>().is_ok_and(|number| (1..=MAX_SIGNAL).contains(&number)) {
        return Some(value);
    }
    let upper = value.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    // systemd and some servers end on real-time signals.
    let real_time =
        name.strip_prefix("RTMIN+").is_some_and(|offset| offset.parse::<u8>().is_ok_and(|offset| offset <= 30));
    if real_time || SIGNALS.contains(&name) {
        return Some(format!("SIG{name}"));
    }
    field.error_hint(format!("{value:?} is not a signal"), "write for example SIGTERM, SIGQUIT or SIGRTMIN+3")
}

pub(super) fn stop_grace_ms(service: &Known<'_>) -> u64 {
    match service.get("stop_grace_period") {
        Some(field) => field.duration_ms(0, MAX_TIME_MS).unwrap_or(DEFAULT_STOP_GRACE_MS),
        None => DEFAULT_STOP_GRACE_MS,
    }
}

/// `ulimits.nofile`, one number for both limits.
pub(super) fn open_files(field: &Field<'_>) -> Option<u64> {
    let known = field.known(&["nofile"], &[])?;
    let nofile = known.get("nofile")?;
    let number = |field: &Field<'_>| field.number(64, 1_048_576);
    if !nofile.is_map() {
        return number(nofile);
    }
    let pair = nofile.known(&["soft", "hard"], &[])?;
    let (Some(soft), Some(hard)) = (pair.get("soft"), pair.get("hard")) else {
        return nofile.error_hint("both soft and hard are needed", "write for example nofile: 65536");
    };
    let (soft_number, hard_number) = (number(soft)?, number(hard)?);
    if soft_number != hard_number {
        return nofile.error_hint(
            format!("the soft limit {soft_number} and the hard limit {hard_number} differ"),
            format!("write nofile: {hard_number}, both limits are the same here"),
        );
    }
    Some(hard_number)
}
