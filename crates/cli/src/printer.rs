//! The one place that writes to standard output and standard error.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};

use anyhow::Result;
use indicatif::{MultiProgress, ProgressBar};
use serde::Serialize;

use crate::args::{Global, Output};

/// Standard output does not take what is written. With a closed pipe the program ends quietly.
#[derive(Debug, thiserror::Error)]
#[error("cannot write to standard output")]
pub struct StdoutError(#[from] pub io::Error);

/// Knows format, quietness, colors and width; owns the progress bars, so that no line breaks one.
#[derive(Clone)]
pub struct Printer {
    output: Output,
    quiet: bool,
    stdout_is_terminal: bool,
    stderr_is_terminal: bool,
    no_color: bool,
    bars: MultiProgress,
}

impl Printer {
    pub fn new(global: &Global) -> Self {
        Self {
            output: global.output,
            quiet: global.quiet,
            stdout_is_terminal: io::stdout().is_terminal(),
            stderr_is_terminal: io::stderr().is_terminal(),
            // https://no-color.org: present and not empty, whatever its value.
            no_color: std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty())
                || std::env::var_os("TERM").is_some_and(|v| v == "dumb"),
            bars: MultiProgress::new(),
        }
    }

    pub fn is_json(&self) -> bool {
        self.output == Output::Json
    }

    pub fn stdout_is_terminal(&self) -> bool {
        self.stdout_is_terminal
    }

    /// Columns of the terminal that standard output is; `None` where it is none.
    pub fn width(&self) -> Option<u16> {
        if !self.stdout_is_terminal {
            return None;
        }
        rustix::termios::tcgetwinsize(io::stdout()).ok().map(|size| size.ws_col).filter(|columns| *columns > 0)
    }

    /// Writes data: a line, or several, without the last line's end.
    pub fn data(&self, text: impl Display) -> Result<(), StdoutError> {
        let line = format!("{text}\n");
        self.bars.suspend(|| self.data_bytes(line.as_bytes()))
    }

    /// Writes data as it is.
    pub fn data_bytes(&self, bytes: &[u8]) -> Result<(), StdoutError> {
        let mut stdout = io::stdout().lock();
        stdout.write_all(bytes)?;
        stdout.flush()?;
        Ok(())
    }

    /// What `next` gives, or `None` once nobody reads standard output any more: a stream that has nothing to say would
    /// not notice that by itself.
    pub async fn while_read<T>(&self, next: impl Future<Output = Option<T>>) -> Option<T> {
        tokio::select! {
            biased;
            value = next => value,
            () = reader_gone() => None,
        }
    }

    /// One value, readable.
    pub fn json(&self, value: &(impl Serialize + ?Sized)) -> Result<()> {
        Ok(self.data(serde_json::to_string_pretty(value)?)?)
    }

    /// One value of a stream, on one line.
    pub fn json_line(&self, value: &impl Serialize) -> Result<()> {
        Ok(self.data(serde_json::to_string(value)?)?)
    }

    /// The value as JSON if that is asked for; else what `text` makes of it, if anything.
    pub fn value<T: Serialize + ?Sized>(&self, value: &T, text: impl FnOnce(&T) -> String) -> Result<()> {
        if self.is_json() {
            return self.json(value);
        }
        match text(value) {
            text if text.is_empty() => Ok(()),
            text => Ok(self.data(text)?),
        }
    }

    /// Tells the person something; nothing with `--quiet`.
    pub fn say(&self, text: impl Display) {
        if !self.quiet {
            self.stderr_line(&text.to_string());
        }
    }

    /// Told also with `--quiet`: `error` or `hint` in color, then the text.
    pub fn labelled(&self, label: &str, text: impl Display) {
        let label = match label {
            "error" => self.paint_err("1;31", "error:"),
            "hint" => self.paint_err("1;36", "hint:"),
            other => self.paint_err("2", &format!("{other}:")),
        };
        self.stderr_line(&format!("{label} {text}"));
    }

    /// Text for standard output in bold.
    pub fn bold(&self, text: &str) -> String {
        if self.stdout_is_terminal && !self.no_color { format!("\x1b[1m{text}\x1b[0m") } else { text.to_owned() }
    }

    fn paint_err(&self, code: &str, text: &str) -> String {
        if self.stderr_is_terminal && !self.no_color { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    fn stderr_line(&self, text: &str) {
        // Where standard error is closed there is nobody left to tell.
        self.bars.suspend(|| drop(writeln!(io::stderr(), "{text}")));
    }

    /// A place for a progress bar; `None` where plain lines are to be said instead.
    pub fn bar(&self) -> Option<ProgressBar> {
        (self.stderr_is_terminal && !self.quiet).then(|| self.bars.add(ProgressBar::no_length()))
    }

    /// What the program does, on standard error: warnings, more with `-v`, and what a daemon does also without;
    /// `GODWIT_LOG` takes a filter as tracing-subscriber writes them.
    pub fn start_tracing(&self, verbose: u8, is_daemon: bool) {
        let level = match verbose {
            0 if is_daemon => "warn,godwit=info",
            0 => "warn",
            1 => "warn,godwit=debug",
            _ => "trace",
        };
        let filter = tracing_subscriber::EnvFilter::try_from_env("GODWIT_LOG")
            .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(level));
        let bars = self.bars.clone();
        tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_ansi(self.stderr_is_terminal && !self.no_color)
            .with_writer(move || AroundBars(bars.clone()))
            .init();
    }
}

/// Standard error, with the progress bars out of the way while something is written.
struct AroundBars(MultiProgress);

impl Write for AroundBars {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.suspend(|| io::stderr().write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// Resolves when the reading end of standard output is closed; never where it is no pipe.
async fn reader_gone() {
    use std::os::fd::AsFd;
    use tokio::io::Interest;
    use tokio::net::unix::pipe::Sender;
    // Only watched for errors, so its mode stays as it is.
    let watch = io::stdout().as_fd().try_clone_to_owned().and_then(Sender::from_owned_fd_unchecked);
    match watch {
        Ok(watch) if watch.ready(Interest::ERROR).await.is_ok() => {}
        // A file cannot be watched, and cannot go away either.
        _ => std::future::pending().await,
    }
}
