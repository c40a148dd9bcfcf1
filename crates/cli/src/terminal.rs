//! The person's terminal: raw mode, and its size.

use std::io;

use godwit_api::session::TerminalSize;
use rustix::termios::{self, OptionalActions, Termios};

/// Sizes of a terminal that does not know its own.
const DEFAULT_SIZE: TerminalSize = TerminalSize { rows: 24, columns: 80 };

/// Standard input in raw mode until this is dropped: each key goes through as it is, Ctrl-C too.
///
/// Signals that end the program are awaited by whoever holds this, so that it is dropped on that way as well; a panic
/// unwinds through it.
pub struct RawMode {
    before: Termios,
}

impl RawMode {
    pub fn enter() -> io::Result<Self> {
        let before = termios::tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        termios::tcsetattr(io::stdin(), OptionalActions::Drain, &raw)?;
        Ok(Self { before })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // A terminal that is gone needs no restoring.
        let _ = termios::tcsetattr(io::stdin(), OptionalActions::Drain, &self.before);
    }
}

/// The size of the terminal that is standard input, output or error, in this order.
pub fn size() -> TerminalSize {
    let asked = termios::tcgetwinsize(io::stdin())
        .or_else(|_| termios::tcgetwinsize(io::stdout()))
        .or_else(|_| termios::tcgetwinsize(io::stderr()));
    match asked {
        Ok(size) if size.ws_row > 0 && size.ws_col > 0 => TerminalSize { rows: size.ws_row, columns: size.ws_col },
        _ => DEFAULT_SIZE,
    }
}
