//! How a move goes on: a bar on a terminal, plain lines elsewhere.

use std::time::{Duration, Instant};

use godwit_model::Bytes;
use godwit_model::migration::{Move, Outcome, Phase};
use indicatif::{ProgressBar, ProgressStyle};

use crate::human;
use crate::printer::Printer;

/// Least time between two plain lines of one phase, in milliseconds.
const LINE_INTERVAL_MS: u64 = 2_000;
/// How often the bar is drawn again while nothing is told, in milliseconds: its time goes on.
const TICK_MS: u64 = 100;
/// The rate shown is that of the last two looks at least this far apart, in milliseconds.
const RATE_WINDOW_MS: u64 = 500;

pub struct Progress {
    printer: Printer,
    bar: Option<ProgressBar>,
    rate: Rate,
    last_line: Option<(Phase, Instant)>,
}

impl Progress {
    pub fn new(printer: &Printer, begun: &Move) -> Self {
        let bar = printer.bar();
        if let Some(bar) = &bar {
            bar.set_style(style());
            bar.set_prefix(format!("{} → {}", begun.name, begun.to));
            bar.enable_steady_tick(Duration::from_millis(TICK_MS));
        }
        let mut progress = Self { printer: printer.clone(), bar, rate: Rate::default(), last_line: None };
        progress.show(begun);
        progress
    }

    pub fn show(&mut self, one: &Move) {
        let now = Instant::now();
        self.rate.look(one.progress.bytes_sent, now);
        match &self.bar {
            Some(bar) => {
                bar.set_length(one.progress.bytes_total.max(one.progress.bytes_sent).max(1));
                bar.set_position(one.progress.bytes_sent);
                bar.set_message(format!("{:<9} {}", one.phase.as_str(), self.numbers(one)));
            }
            None => self.line(one, now),
        }
    }

    /// Tells something without breaking the bar.
    pub fn say(&self, text: &str) {
        self.printer.say(text);
    }

    /// The bar vanishes: the summary says more.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    fn line(&mut self, one: &Move, now: Instant) {
        let soon = Duration::from_millis(LINE_INTERVAL_MS);
        let told = matches!(self.last_line, Some((phase, at)) if phase == one.phase && now - at < soon);
        if told || matches!(one.outcome, Outcome::Failed { .. }) {
            return;
        }
        self.last_line = Some((one.phase, now));
        let numbers = self.numbers(one);
        let separator = if numbers.is_empty() { "" } else { ": " };
        self.printer.say(format_args!("{} {} → {}: {}{separator}{numbers}", one.name, one.from, one.to, one.phase));
    }

    fn numbers(&self, one: &Move) -> String {
        let progress = &one.progress;
        let nothing_yet = progress.bytes_total == 0 && progress.bytes_sent == 0;
        if nothing_yet || one.phase < Phase::Copy {
            return String::new();
        }
        let mut text = format!("{} / {}", Bytes(progress.bytes_sent), Bytes(progress.bytes_total));
        if let Some(rate) = self.rate.text() {
            text.push_str(", ");
            text.push_str(&rate);
        }
        if one.phase == Phase::Copy {
            text.push_str(&format!(", round {}", progress.rounds.max(1)));
        }
        text
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}

/// Fits 80 columns with names of usual length; the last part is cut where there is less room.
const TEMPLATE: &str = "{prefix}  [{bar:12}]  {wide_msg}";

fn style() -> ProgressStyle {
    // The template is a constant: that it is one is what the test below checks.
    ProgressStyle::with_template(TEMPLATE).unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ")
}

/// Bytes in a second, between two looks.
#[derive(Default)]
struct Rate {
    from: Option<(u64, Instant)>,
    last: Option<String>,
}

impl Rate {
    fn look(&mut self, bytes: u64, now: Instant) {
        match self.from {
            None => self.from = Some((bytes, now)),
            Some((before, at)) if now - at >= Duration::from_millis(RATE_WINDOW_MS) => {
                self.last = (bytes > before).then(|| human::rate(bytes - before, now - at));
                self.from = Some((bytes, now));
            }
            Some(_) => {}
        }
    }

    fn text(&self) -> Option<String> {
        self.last.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_template_is_one() {
        assert!(ProgressStyle::with_template(TEMPLATE).is_ok());
    }

    #[test]
    fn the_rate_is_that_of_the_last_window() {
        let start = Instant::now();
        let mut rate = Rate::default();
        rate.look(0, start);
        rate.look(50 << 20, start + Duration::from_millis(100));
        assert_eq!(rate.text(), None);
        rate.look(100 << 20, start + Duration::from_secs(1));
        assert_eq!(rate.text().as_deref(), Some("100 MiB/s"));
        rate.look(100 << 20, start + Duration::from_secs(2));
        assert_eq!(rate.text(), None, "nothing was sent in this window");
    }
}
