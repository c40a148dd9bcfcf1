//! What the real registry cannot be made to do: tokens, broken connections, endless answers.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;
use common::*;
use godwit_image::{Digest, FetchError, ImageSource, PullError, PullOptions, RegistryAuth, RegistryTls, UnpackError};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

/// A request: its path with query, and its headers in lower case.
struct Request {
    path: String,
    headers: HashMap<String, String>,
}

/// Raw bytes of an answer; the connection ends after them.
type Answer = Vec<u8>;

fn answer(status: &str, headers: &str, body: &[u8]) -> Answer {
    [
        format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n", body.len()).as_bytes(),
        body,
    ]
    .concat()
}

/// Serves one connection after another until the test ends.
async fn serve(handler: impl Fn(&Request) -> Answer + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                match stream.read_u8().await {
                    Ok(byte) => head.push(byte),
                    Err(_) => break,
                }
            }
            let head = String::from_utf8(head).unwrap();
            let Some(path) = head.split(' ').nth(1) else { continue };
            let headers = head
                .lines()
                .skip(1)
                .filter_map(|line| line.split_once(": "))
                .map(|(k, v)| (k.to_lowercase(), v.into()))
                .collect();
            let answer = handler(&Request { path: path.into(), headers });
            let _ = stream.write_all(&answer).await;
            let _ = stream.shutdown().await;
        }
    });
    address
}

fn plain() -> PullOptions {
    PullOptions { tls: RegistryTls::Insecure, ..Default::default() }
}

fn source(address: &str) -> ImageSource {
    format!("{address}/app:1").parse().unwrap()
}

/// An image's blobs and manifest by the end of their paths.
fn documents(layers: &[Layer]) -> HashMap<String, Vec<u8>> {
    let layout = Layout::new();
    let manifest = layout.manifest(layers, arch(), serde_json::json!({}));
    let mut all: HashMap<String, Vec<u8>> = names(&layout.dir.path().join("blobs/sha256"))
        .into_iter()
        .map(|hex| {
            (
                format!("/v2/app/blobs/sha256:{hex}"),
                std::fs::read(layout.dir.path().join("blobs/sha256").join(hex)).unwrap(),
            )
        })
        .collect();
    let digest: Digest = manifest["digest"].as_str().unwrap().parse().unwrap();
    all.insert("/v2/app/manifests/1".into(), std::fs::read(layout.blob_path(digest)).unwrap());
    all
}

fn found(documents: &HashMap<String, Vec<u8>>, path: &str) -> Answer {
    match documents.get(path) {
        Some(body) => answer("200 OK", "", body),
        None => answer("404 Not Found", "", b""),
    }
}

fn noise(bytes: u32) -> Vec<u8> {
    (0..bytes).map(|i| (i.wrapping_mul(2654435761) >> 15) as u8).collect()
}

#[tokio::test]
async fn bearer_tokens() {
    if not_root() {
        return;
    }
    for (password, works) in [("secret", true), ("guess", false)] {
        let documents = documents(&[layer(&[file("f", "x")])]);
        let tokens = Arc::new(Mutex::new(Vec::new()));
        let (asked, here) = (Arc::clone(&tokens), Arc::new(Mutex::new(String::new())));
        let me = Arc::clone(&here);
        let address = serve(move |request| {
            if request.path.starts_with("/token") {
                asked.lock().unwrap().push(request.path.clone());
                // ann:secret
                return match request.headers.get("authorization").map(String::as_str) {
                    Some("Basic YW5uOnNlY3JldA==") => answer("200 OK", "", br#"{"access_token":"abc"}"#),
                    _ => answer("401 Unauthorized", "", b"no"),
                };
            }
            if request.headers.get("authorization").map(String::as_str) == Some("Bearer abc") {
                return found(&documents, &request.path);
            }
            let challenge =
                format!("WWW-Authenticate: Bearer realm=\"http://{}/token\",service=\"reg\"\r\n", me.lock().unwrap());
            answer("401 Unauthorized", &challenge, b"")
        })
        .await;
        *here.lock().unwrap() = address.clone();
        let fixture = fixture();
        let options =
            PullOptions { auth: RegistryAuth::Basic { user: "ann".into(), password: password.into() }, ..plain() };
        match fixture.ensure(&source(&address), &options).await {
            Ok(image) => assert!(works && image.layers[0].join("f").exists()),
            Err(PullError::Fetch { source: FetchError::WrongPassword { .. }, .. }) => assert!(!works),
            Err(error) => panic!("{}", chain(&error)),
        }
        assert_eq!(*tokens.lock().unwrap(), ["/token?scope=repository%3Aapp%3Apull&service=reg"]);
    }
}

/// The connection breaks three times; each time the pull goes on where it was.
#[tokio::test]
async fn broken_connections_are_resumed() {
    if not_root() {
        return;
    }
    for ranges in [true, false] {
        let tar = archive(&[file("noise", noise(900_000))]);
        let big = layer(&[file("noise", noise(900_000))]);
        let documents = documents(std::slice::from_ref(&big));
        let path = format!("/v2/app/blobs/{}", big.digest);
        let starts = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&starts);
        let address = serve(move |request| {
            if request.path != path {
                return found(&documents, &request.path);
            }
            let asked = request
                .headers
                .get("range")
                .map_or(0, |range| range.trim_start_matches("bytes=").trim_end_matches('-').parse::<usize>().unwrap());
            let mut starts = seen.lock().unwrap();
            starts.push(asked);
            let from = if ranges { asked } else { 0 };
            let status = if from > 0 { "206 Partial Content" } else { "200 OK" };
            let range = format!("Content-Range: bytes {from}-{}/{}\r\n", big.size - 1, big.size);
            let mut whole = answer(status, &range, &big.blob[from..]);
            if starts.len() < 4 {
                let headers = whole.len() - (big.blob.len() - from);
                whole.truncate(headers + (starts.len() * 200_000).min(big.blob.len() - from));
            }
            whole
        })
        .await;
        let fixture = fixture();
        let image = fixture.ensure(&source(&address), &plain()).await.unwrap_or_else(|e| panic!("{}", chain(&e)));
        assert_eq!(std::fs::read(image.layers[0].join("noise")).unwrap(), noise(900_000));
        let starts = starts.lock().unwrap();
        assert!(starts.len() >= 3 && starts.windows(2).all(|pair| pair[0] < pair[1]), "{starts:?}");
        assert!(tar.len() > *starts.last().unwrap());
        fixture.assert_clean();
    }
}

#[tokio::test]
async fn a_connection_that_stays_broken() {
    if not_root() {
        return;
    }
    let big = layer(&[file("noise", noise(900_000))]);
    let documents = documents(std::slice::from_ref(&big));
    let path = format!("/v2/app/blobs/{}", big.digest);
    let tries = Arc::new(Mutex::new(0));
    let count = Arc::clone(&tries);
    let address = serve(move |request| {
        if request.path != path {
            return found(&documents, &request.path);
        }
        *count.lock().unwrap() += 1;
        answer("200 OK", "", &big.blob)[..1000].to_vec()
    })
    .await;
    let fixture = fixture();
    let error = fixture.ensure(&source(&address), &plain()).await.unwrap_err();
    assert!(matches!(error, PullError::Unpack { source: UnpackError::Fetch(_), .. }), "{}", chain(&error));
    assert!(chain(&error).contains("no answer from registry"), "{}", chain(&error));
    assert_eq!(*tries.lock().unwrap(), 5);
    fixture.assert_clean();
}

#[tokio::test]
async fn endless_and_lying_answers() {
    if not_root() {
        return;
    }
    let endless = serve(|_| {
        let head = "HTTP/1.1 200 OK\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n".to_owned();
        let chunk = format!("{:x}\r\n{}\r\n", 1 << 20, " ".repeat(1 << 20));
        (head + &chunk.repeat(6)).into_bytes()
    })
    .await;
    let fixture = fixture();
    let error = fixture.ensure(&source(&endless), &plain()).await.unwrap_err();
    assert!(matches!(error, PullError::Fetch { source: FetchError::TooLong { .. }, .. }), "{}", chain(&error));

    // Another manifest than the digest says.
    let documents = documents(&[layer(&[])]);
    let lying = serve(move |request| match request.path.starts_with("/v2/app/manifests/") {
        true => found(&documents, "/v2/app/manifests/1"),
        false => found(&documents, &request.path),
    })
    .await;
    let pinned = format!("{lying}/app@{}", Digest::of(b"wanted")).parse().unwrap();
    let error = fixture.ensure(&pinned, &plain()).await.unwrap_err();
    assert!(matches!(error, PullError::Fetch { source: FetchError::Digest { .. }, .. }), "{}", chain(&error));
    fixture.ensure(&source(&lying), &plain()).await.unwrap();

    for (status, text) in
        [("403 Forbidden", "does not allow"), ("500 Oops", "status 500"), ("401 Unauthorized", "authentication")]
    {
        let address = serve(move |_| answer(status, "", b"{\"errors\":[]}")).await;
        let error = fixture.ensure(&source(&address), &plain()).await.unwrap_err();
        assert!(chain(&error).contains(text), "{}", chain(&error));
    }
    fixture.assert_clean();
}

/// Dropping the future stops the pull and removes what it had unpacked, and the next one works.
#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_pull_cleans_up() {
    if not_root() {
        return;
    }
    let big = layer(&[file("noise", noise(900_000))]);
    let all = documents(std::slice::from_ref(&big));
    let path = format!("/v2/app/blobs/{}", big.digest);
    let reached = Arc::new(tokio::sync::Notify::new());
    let (tell, stall) = (Arc::clone(&reached), Arc::new(Mutex::new(true)));
    let stalls = Arc::clone(&stall);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let (all, path, tell, stalls) = (all.clone(), path.clone(), Arc::clone(&tell), Arc::clone(&stalls));
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(stream.read_u8().await.unwrap());
                }
                let asked = String::from_utf8(head).unwrap().split(' ').nth(1).unwrap().to_owned();
                let body = found(&all, &asked);
                if asked == path && *stalls.lock().unwrap() {
                    // Half of it, then silence until the other side goes away.
                    stream.write_all(&body[..500_000]).await.unwrap();
                    tell.notify_one();
                    let _ = stream.read_u8().await;
                    return;
                }
                stream.write_all(&body).await.unwrap();
            });
        }
    });
    let fixture = fixture();
    let (store, from) = (fixture.store.clone(), source(&address));
    let pull = tokio::spawn(async move { store.ensure(&from, &plain(), &godwit_image::NoProgress).await });
    reached.notified().await;
    pull.abort();
    assert!(pull.await.unwrap_err().is_cancelled());
    *stall.lock().unwrap() = false;
    // Waits for the layer's lock, which is held until the first one's files are gone.
    let limit = std::time::Duration::from_secs(20);
    let image = tokio::time::timeout(limit, fixture.ensure(&source(&address), &plain())).await.unwrap().unwrap();
    assert!(image.layers[0].join("noise").exists());
    fixture.assert_clean();
}
