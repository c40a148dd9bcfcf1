//! Times, sizes and rates as people read them. Exact numbers are in the JSON.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use godwit_model::Bytes;
use jiff::Timestamp;
use jiff::tz::TimeZone;

/// What is shown where there is nothing to show.
pub const NOTHING: &str = "-";

/// A duration of milliseconds: `0.4 ms`, `87.3 ms`, `4.21 s`, `3m 20s`.
pub fn millis(ms: f64) -> String {
    match ms {
        ms if ms < 1000.0 => format!("{ms:.1} ms"),
        ms if ms < 60_000.0 => format!("{:.2} s", ms / 1000.0),
        ms => span(Duration::from_millis(ms as u64)),
    }
}

/// A longer duration in its two largest units: `12s`, `3m 20s`, `5h 2m`, `9d 4h`.
pub fn span(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{minutes}m {}s", seconds % 60),
        3600..86_400 => format!("{hours}h {}m", minutes % 60),
        _ => format!("{days}d {}h", hours % 24),
    }
}

/// A duration as people type it: `500ms`, `90s`, `5m`, `2h`; a number alone counts seconds.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let split = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let unit_seconds = match unit {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err("write a number and ms, s, m or h, for example 90s".to_owned()),
    };
    let seconds = number.parse::<f64>().map_err(|_| "write a number first, for example 90s".to_owned())?;
    Duration::try_from_secs_f64(seconds * unit_seconds).map_err(|_| "that is too long".to_owned())
}

/// Now, in milliseconds since the epoch.
pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map(|d| d.as_millis() as u64).unwrap_or_default()
}

/// How long ago that was. What lies in the future by another clock is now.
pub fn since(at_ms: u64) -> String {
    span(Duration::from_millis(now_ms().saturating_sub(at_ms)))
}

/// Date and time in this machine's time zone: `2026-11-24 04:30:01`.
pub fn date_time(at_ms: u64) -> String {
    let Ok(at) = i64::try_from(at_ms).map_err(drop).and_then(|ms| Timestamp::from_millisecond(ms).map_err(drop)) else {
        return NOTHING.to_owned();
    };
    at.to_zoned_datetime(TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S").to_string()
}

/// Bytes in a second.
pub fn rate(bytes: u64, elapsed: Duration) -> String {
    let seconds = elapsed.as_secs_f64();
    if seconds <= 0.0 { NOTHING.to_owned() } else { format!("{}/s", Bytes((bytes as f64 / seconds) as u64)) }
}

/// The value as text, or a dash.
pub fn or_dash(value: Option<impl ToString>) -> String {
    value.map_or_else(|| NOTHING.to_owned(), |v| v.to_string())
}

/// `1 container`, `2 containers`.
pub fn count(n: usize, one: &str) -> String {
    if n == 1 { format!("1 {one}") } else { format!("{n} {one}s") }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_three_significant_digits_or_two_units() {
        for (ms, text) in [(0.04, "0.0 ms"), (87.26, "87.3 ms"), (4210.0, "4.21 s"), (200_000.0, "3m 20s")] {
            assert_eq!(millis(ms), text);
        }
        for (s, text) in [(0, "0s"), (59, "59s"), (3600, "1h 0m"), (86_400 * 9 + 4 * 3600 + 5, "9d 4h")] {
            assert_eq!(span(Duration::from_secs(s)), text);
        }
    }

    #[test]
    fn durations_are_read_with_their_unit() {
        for (text, ms) in [("60s", 60_000), ("500ms", 500), ("1.5m", 90_000), ("7", 7_000), ("2h", 7_200_000)] {
            assert_eq!(parse_duration(text).unwrap(), Duration::from_millis(ms), "{text}");
        }
        for bad in ["", "s", "1d", "-1s", "1e99s", "1..2s"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_rate_of_no_time_is_none() {
        assert_eq!(rate(5, Duration::ZERO), NOTHING);
        assert_eq!(rate(10 << 20, Duration::from_secs(2)), "5.00 MiB/s");
    }
}
