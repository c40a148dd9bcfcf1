//! A played exec session.

use axum::extract::ws::{Message, WebSocket};
use serde_json::{Value, json};

/// `exit N` ends with N; `size` says the terminal's; `sleep` waits; anything else writes its input back.
pub async fn session(mut socket: WebSocket) {
    let exit = |code: i32| Message::Text(json!({"type": "exit", "code": code}).to_string().into());
    let out = |text: String| Message::Binary(format!("\x01{text}").into_bytes().into());
    let mut argv: Vec<String> = Vec::new();
    while let Some(Ok(message)) = socket.recv().await {
        let answer = match message {
            Message::Text(text) => {
                let control: Value = serde_json::from_str(&text).unwrap();
                if let Some(size) = control.get("size") {
                    out(format!("{}x{}\r\n", size["columns"], size["rows"]))
                } else {
                    let request = &control["request"];
                    argv = serde_json::from_value(request["argv"].clone()).unwrap();
                    match argv[0].as_str() {
                        "exit" => exit(argv[1].parse().unwrap()),
                        "size" => out(format!("{}\r\n", request["terminal"])),
                        "sleep" => out("asleep\r\n".to_owned()),
                        _ => Message::Binary(b"\x02ready\r\n".as_slice().into()),
                    }
                }
            }
            Message::Binary(bytes) if bytes.as_ref() == b"\0" => match argv[0].as_str() {
                "sleep" => continue,
                _ => exit(0),
            },
            Message::Binary(bytes) => out(String::from_utf8_lossy(&bytes[1..]).into_owned()),
            _ => return,
        };
        if socket.send(answer).await.is_err() {
            return;
        }
    }
}
