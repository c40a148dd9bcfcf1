//! `godwit exec`.

use std::io::{self, IsTerminal, Read, Write};

use anyhow::{Context, Result};
use clap::Args;
use godwit_api::client::{Client, ExecOutput, ExecReceiver, ExecSender};
use godwit_api::session::ExecRequest;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use crate::failure::Failure;
use crate::names;
use crate::printer::{Printer, StdoutError};
use crate::terminal::{self, RawMode};

/// The largest piece read from standard input at once, in bytes.
const STDIN_PIECE_BYTES: usize = 32 << 10;
/// Pieces of standard input that wait to be sent; then reading waits.
const MAX_STDIN_PIECES: usize = 4;

#[derive(Debug, Args)]
pub struct ExecArgs {
    /// Pass standard input on
    #[arg(short, long)]
    interactive: bool,
    /// Run it on a terminal
    #[arg(short, long)]
    tty: bool,
    /// Set a variable for it
    #[arg(short, long = "env", value_name = "NAME=VALUE")]
    environment: Vec<String>,
    /// Where it starts, instead of the container's own directory
    #[arg(short, long, value_name = "DIRECTORY")]
    workdir: Option<String>,
    /// Who it runs as, instead of the container's own user
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// For example shop/db-1, or shop/db where there is only one
    container: String,
    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "COMMAND")]
    command: Vec<String>,
}

pub async fn run(client: &Client, printer: &Printer, args: ExecArgs) -> Result<u8> {
    let raw = args.interactive && args.tty;
    if raw && !io::stdin().is_terminal() {
        return Err(Failure::new("standard input is no terminal").hint("leave -t out, or -i").into());
    }
    if let Some(wrong) = args.environment.iter().find(|pair| !pair.contains('=')) {
        return Err(Failure::new(format!("--env {wrong}: write NAME=VALUE")).into());
    }
    let name = names::container(client, &args.container).await?;
    let request = ExecRequest {
        argv: args.command,
        environment: args.environment,
        working_dir: args.workdir,
        user: args.user,
        terminal: args.tty.then(terminal::size),
    };
    let mut signals = Signals::new()?;
    let (sender, receiver) = client.exec(&name, request).await?;
    let raw = raw.then(RawMode::enter).transpose().context("cannot set the terminal to raw mode")?;
    let input = tokio::spawn(send_input(sender, args.interactive, args.tty));
    let ended = tokio::select! {
        ended = copy_output(receiver, printer) => ended,
        number = signals.any() => Ok(128 + number),
    };
    input.abort();
    drop(raw);
    // Exit codes are one byte, as wait(2) has them.
    Ok((ended? & 0xff) as u8)
}

/// Signals that end this program; the terminal is to be restored before that. In raw mode Ctrl-C is no signal but
/// a byte for the container.
struct Signals([(Signal, i32); 4]);

impl Signals {
    fn new() -> Result<Self> {
        let open = |kind: SignalKind| -> Result<(Signal, i32)> {
            let number = kind.as_raw_value();
            Ok((signal(kind).with_context(|| format!("cannot wait for signal {number}"))?, number))
        };
        Ok(Self([
            open(SignalKind::terminate())?,
            open(SignalKind::hangup())?,
            open(SignalKind::interrupt())?,
            open(SignalKind::quit())?,
        ]))
    }

    /// The number of the first that comes.
    async fn any(&mut self) -> i32 {
        let [a, b, c, d] = &mut self.0;
        tokio::select! {
            _ = a.0.recv() => a.1,
            _ = b.0.recv() => b.1,
            _ = c.0.recv() => c.1,
            _ = d.0.recv() => d.1,
        }
    }
}

async fn copy_output(mut receiver: ExecReceiver, printer: &Printer) -> Result<i32> {
    loop {
        match receiver.next().await? {
            Some(ExecOutput::Stdout(bytes)) => printer.data_bytes(&bytes)?,
            Some(ExecOutput::Stderr(bytes)) => io::stderr().write_all(&bytes).map_err(StdoutError)?,
            Some(ExecOutput::Exit(code)) => return Ok(code),
            None => return Err(Failure::new("the session ended without an exit code").into()),
        }
    }
}

/// Passes on standard input and the terminal's size. What goes wrong here also ends the output, which tells of it.
async fn send_input(mut sender: ExecSender, interactive: bool, tty: bool) {
    let Ok(mut resized) = signal(SignalKind::window_change()) else { return };
    let mut pieces = if interactive {
        read_stdin()
    } else {
        if sender.close_stdin().await.is_err() {
            return;
        }
        mpsc::channel(1).1
    };
    let mut open = interactive;
    loop {
        let sent = tokio::select! {
            piece = pieces.recv(), if open => match piece {
                Some(piece) => sender.stdin(&piece).await,
                None => {
                    open = false;
                    sender.close_stdin().await
                }
            },
            Some(()) = resized.recv(), if tty => sender.resize(terminal::size()).await,
            else => return std::future::pending().await,
        };
        if sent.is_err() {
            return;
        }
    }
}

/// Standard input, read by a thread of its own: a read of a terminal cannot be called off, and the thread ends with
/// the process.
fn read_stdin() -> mpsc::Receiver<Vec<u8>> {
    let (pieces, receiver) = mpsc::channel(MAX_STDIN_PIECES);
    std::thread::spawn(move || {
        let mut buffer = vec![0; STDIN_PIECE_BYTES];
        loop {
            match io::stdin().read(&mut buffer) {
                Ok(0) => return,
                Ok(n) => {
                    if pieces.blocking_send(buffer[..n].to_vec()).is_err() {
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    });
    receiver
}
