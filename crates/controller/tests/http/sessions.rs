//! Logs and exec: the controller passes them between a person and the container's host.

use futures_util::{SinkExt, StreamExt};
use godwit_api::client::{ClientError, ExecOutput};
use godwit_api::link::{Request, SessionBody};
use godwit_api::session::{ExecControl, ExecRequest, LogLine, LogStream, TerminalSize};
use tokio_tungstenite::tungstenite::{Error, Message};

use crate::agent::{Agent, Socket, agent, dial, until};
use crate::controller::{Controller, refusal, request, start, within};

const DB: &str = "shop/db-1";

/// A controller, one host, and a container that runs there.
async fn one_container(dir: &std::path::Path) -> (Controller, Agent) {
    let controller = start(dir).await;
    let agent = agent(&controller, "h1").await;
    controller.client().apply(&request("shop", 1)).await.unwrap();
    until(&controller, DB, "running").await;
    (controller, agent)
}

/// The session that the agent is asked to open next.
async fn asked(agent: &mut Agent) -> (String, SessionBody) {
    loop {
        if let Request::OpenSession { session, body } = within(agent.asked.recv()).await.unwrap() {
            return (format!("/v1/agent/sessions/{session}"), body);
        }
    }
}

fn log_line(n: u64) -> LogLine {
    LogLine { at_ms: n, stream: LogStream::Stdout, text: format!("line {n}") }
}

fn text(value: &impl serde::Serialize) -> Message {
    Message::Text(serde_json::to_string(value).unwrap().into())
}

/// Until the other side has ended it.
async fn ended(socket: &mut Socket) {
    let end = async {
        while let Some(Ok(message)) = socket.next().await {
            if matches!(message, Message::Close(_)) {
                return;
            }
        }
    };
    within(end).await;
}

#[tokio::test]
async fn a_log_comes_whole_and_ends() {
    let dir = tempfile::tempdir().unwrap();
    let (controller, mut agent) = one_container(dir.path()).await;
    let serve = async {
        let (path, body) = asked(&mut agent).await;
        assert!(matches!(body, SessionBody::Logs { tail: Some(3), follow: false, .. }), "{body:?}");
        let mut socket = dial(&controller, Some(&agent.identity), &path).await.unwrap();
        for n in 1..=500 {
            socket.send(text(&log_line(n))).await.unwrap();
        }
        socket.close(None).await.unwrap();
        ended(&mut socket).await;
    };
    let read = async {
        let mut lines = controller.client().logs(&DB.parse().unwrap(), Some(3), false).await.unwrap();
        let mut all = Vec::new();
        while let Some(line) = within(lines.next()).await {
            all.push(line.unwrap());
        }
        all
    };
    let ((), all) = tokio::join!(serve, read);
    assert_eq!(all, (1..=500).map(log_line).collect::<Vec<_>>());
    controller.stop().await;
}

#[tokio::test]
async fn a_reader_that_goes_away_ends_the_agents_side() {
    let dir = tempfile::tempdir().unwrap();
    let (controller, mut agent) = one_container(dir.path()).await;
    let (client, name) = (controller.client(), DB.parse().unwrap());
    let (path, lines) = tokio::join!(
        async {
            let (path, _) = asked(&mut agent).await;
            let mut socket = dial(&controller, Some(&agent.identity), &path).await.unwrap();
            socket.send(text(&log_line(1))).await.unwrap();
            socket
        },
        client.logs(&name, None, true)
    );
    let (mut socket, mut lines) = (path, lines.unwrap());
    assert_eq!(within(lines.next()).await.unwrap().unwrap(), log_line(1));
    drop(lines);
    ended(&mut socket).await;
    controller.stop().await;
}

#[tokio::test]
async fn a_log_that_breaks_off_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let (controller, mut agent) = one_container(dir.path()).await;
    let (client, name) = (controller.client(), DB.parse().unwrap());
    let (socket, lines) = tokio::join!(
        async {
            let (path, _) = asked(&mut agent).await;
            dial(&controller, Some(&agent.identity), &path).await.unwrap()
        },
        client.logs(&name, None, true)
    );
    drop(socket);
    let end = within(lines.unwrap().next()).await;
    assert!(matches!(&end, Some(Err(ClientError::Api { body, .. })) if body.error.contains("broke off")), "{end:?}");
    controller.stop().await;
}

fn exec_request(argv: &[&str]) -> ExecRequest {
    ExecRequest {
        argv: argv.iter().map(|&a| a.to_owned()).collect(),
        environment: Vec::new(),
        working_dir: None,
        user: None,
        terminal: None,
    }
}

#[tokio::test]
async fn input_output_and_exit_code_pass_unchanged() {
    let dir = tempfile::tempdir().unwrap();
    let (controller, mut agent) = one_container(dir.path()).await;
    let serve = async {
        let (path, body) = asked(&mut agent).await;
        let SessionBody::Exec { request, .. } = body else { panic!("{body:?}") };
        assert_eq!(request, exec_request(&["cat"]));
        let mut socket = dial(&controller, Some(&agent.identity), &path).await.unwrap();
        socket.send(Message::Binary(b"\x02ready".as_slice().into())).await.unwrap();
        let mut resized = false;
        loop {
            match within(socket.next()).await.unwrap().unwrap() {
                Message::Binary(bytes) if bytes.len() > 1 => {
                    let mut echo = bytes.to_vec();
                    echo[0] = 1;
                    socket.send(Message::Binary(echo.into())).await.unwrap();
                }
                Message::Binary(_end_of_input) => break,
                Message::Text(text) => {
                    resized |= matches!(serde_json::from_str(&text).unwrap(), ExecControl::Resize { .. });
                }
                _ => {}
            }
        }
        assert!(resized);
        socket.send(text(&ExecControl::Exit { code: 7 })).await.unwrap();
        socket.close(None).await.unwrap();
        ended(&mut socket).await;
    };
    let input: Vec<u8> = (0..300_000u32).map(|n| (n % 251) as u8).collect();
    let run = async {
        let (mut sender, mut receiver) =
            controller.client().exec(&DB.parse().unwrap(), exec_request(&["cat"])).await.unwrap();
        sender.resize(TerminalSize { rows: 1, columns: 2 }).await.unwrap();
        let write = async {
            sender.stdin(&input).await.unwrap();
            sender.close_stdin().await.unwrap();
        };
        let read = async {
            let (mut stdout, mut stderr, mut code) = (Vec::new(), Vec::new(), None);
            while let Some(output) = within(receiver.next()).await.unwrap() {
                match output {
                    ExecOutput::Stdout(bytes) => stdout.extend_from_slice(&bytes),
                    ExecOutput::Stderr(bytes) => stderr.extend_from_slice(&bytes),
                    ExecOutput::Exit(n) => code = Some(n),
                }
            }
            (stdout, stderr, code)
        };
        tokio::join!(write, read).1
    };
    let ((), (stdout, stderr, code)) = tokio::join!(serve, run);
    assert!(stdout == input, "{} bytes of {}", stdout.len(), input.len());
    assert_eq!((stderr.as_slice(), code), (b"ready".as_slice(), Some(7)));
    controller.stop().await;
}

#[tokio::test]
async fn who_leaves_an_exec_session_ends_it_on_the_other_side() {
    let dir = tempfile::tempdir().unwrap();
    let (controller, mut agent) = one_container(dir.path()).await;
    let (client, name) = (controller.client(), DB.parse().unwrap());
    for person_leaves in [true, false] {
        let (mut socket, session) = tokio::join!(
            async {
                let (path, _) = asked(&mut agent).await;
                dial(&controller, Some(&agent.identity), &path).await.unwrap()
            },
            client.exec(&name, exec_request(&["sleep"]))
        );
        let (sender, mut receiver) = session.unwrap();
        if person_leaves {
            drop((sender, receiver));
            ended(&mut socket).await;
        } else {
            drop(socket);
            let end = within(receiver.next()).await;
            assert!(matches!(end, Err(ClientError::Protocol { .. })), "{end:?}");
        }
    }
    controller.stop().await;
}

#[tokio::test]
async fn a_session_is_for_the_host_it_was_made_for_and_for_once() {
    let dir = tempfile::tempdir().unwrap();
    let (controller, mut agent) = one_container(dir.path()).await;
    let stranger = controller.join("h2").await;
    let (client, name) = (controller.client(), DB.parse().unwrap());
    let (_socket, lines) = tokio::join!(
        async {
            let (path, _) = asked(&mut agent).await;
            let not_theirs = dial(&controller, Some(&stranger), &path).await;
            assert!(matches!(&not_theirs, Err(Error::Http(a)) if a.status() == 404), "{not_theirs:?}");
            let socket = dial(&controller, Some(&agent.identity), &path).await.unwrap();
            let again = dial(&controller, Some(&agent.identity), &path).await;
            assert!(matches!(&again, Err(Error::Http(a)) if a.status() == 404), "{again:?}");
            socket
        },
        client.logs(&name, None, true)
    );
    drop(lines.unwrap());
    controller.stop().await;
}

#[tokio::test]
async fn what_does_not_run_or_cannot_be_reached_is_refused_with_a_reason() {
    let dir = tempfile::tempdir().unwrap();
    let (controller, agent) = one_container(dir.path()).await;
    let (client, name) = (controller.client(), DB.parse().unwrap());
    client.stop(&name).await.unwrap();
    until(&controller, DB, "stopped").await;
    let (status, body) = refusal(client.exec(&name, exec_request(&["true"])).await.map(drop));
    assert_eq!((status, body.error.as_str()), (409, "shop/db-1 does not run, it is stopped; start it first"));
    agent.die().await;
    until(&controller, DB, "unknown").await;
    let (status, body) = refusal(client.logs(&name, None, false).await.map(drop));
    assert_eq!((status, body.error.as_str()), (503, "the host h1 is not connected"));
    assert_eq!(refusal(client.exec(&name, exec_request(&["true"])).await.map(drop)).0, 503);
    controller.stop().await;
}
