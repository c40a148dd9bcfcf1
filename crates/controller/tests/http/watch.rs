//! Watching a move.

use godwit_api::link::{FromAgent, Request};
use godwit_api::types::{ErrorBody, MigrateRequest};
use godwit_model::migration::{Move, Outcome, Phase, Progress};

use crate::agent::{agent, until};
use crate::controller::{refusal, request, start, within};

/// Messages of progress, far more than lines may become of them.
const MESSAGES: u64 = 400;

#[tokio::test]
async fn a_watched_move_is_told_a_few_times_a_second_and_to_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let controller = start(dir.path()).await;
    let client = controller.client();
    let mut source = agent(&controller, "h1").await;
    client.apply(&request("shop", 1)).await.unwrap();
    let name = "shop/db-1".parse().unwrap();
    until(&controller, "shop/db-1", "running").await;
    let (status, body) =
        refusal(client.migrate(&name, &MigrateRequest { to: Some("h9".parse().unwrap()), ..Default::default() }).await);
    assert_eq!((status, body.error.as_str(), body.causes.len()), (409, "shop/db-1 cannot be moved", 1));

    let destination = agent(&controller, "h2").await;
    let begun = client.migrate(&name, &MigrateRequest::default()).await.unwrap();
    assert_eq!((begun.from.as_str(), begun.to.as_str()), ("h1", "h2"));
    assert_eq!(refusal(client.migrate(&name, &MigrateRequest::default()).await).0, 409);
    assert_eq!(client.container(&name).await.unwrap().state, "moving");
    let mut lines = client.watch_move(&begun.id).await.unwrap();
    let began = tokio::time::Instant::now();
    let (id, voice) = (begun.id.clone(), source.voice.clone());
    let play = async {
        while !matches!(within(source.asked.recv()).await.unwrap(), Request::StartMove { .. }) {}
        for n in 1..=MESSAGES {
            let progress = Progress { bytes_sent: n, bytes_total: MESSAGES, rounds: 1 };
            voice.send(FromAgent::MoveProgress { id: id.clone(), phase: Phase::Copy, progress }).await.unwrap();
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        let error = ErrorBody::new("the disk is full");
        voice.send(FromAgent::MoveFailed { id: id.clone(), phase: Phase::Copy, error }).await.unwrap();
    };
    let read = async {
        let mut told: Vec<Move> = Vec::new();
        while let Some(line) = within(lines.next()).await {
            told.push(line.unwrap());
        }
        told
    };
    let ((), told) = tokio::join!(play, read);
    let most = began.elapsed().as_millis() / 100 + 3;
    assert!(told.len() >= 3 && told.len() as u128 <= most, "{} lines, {most} at the most", told.len());
    assert!(told.windows(2).all(|w| w[0].progress.bytes_sent <= w[1].progress.bytes_sent && w[0] != w[1]));
    let last = told.last().unwrap();
    assert!(
        matches!(&last.outcome, Outcome::Failed { phase: Phase::Copy, reason } if reason.contains("disk")),
        "{last:?}"
    );
    assert!(told[..told.len() - 1].iter().all(|m| !m.outcome.over()));

    // Whoever asks later gets the end at once; what is over cannot be taken back.
    let mut again = client.watch_move(&begun.id).await.unwrap();
    assert_eq!(within(again.next()).await.unwrap().unwrap(), *last);
    assert!(within(again.next()).await.is_none());
    assert_eq!(refusal(client.cancel_move(&begun.id).await).0, 409);
    assert_eq!(client.moves().await.unwrap().len(), 1);
    drop(destination);
    until(&controller, "shop/db-1", "running").await;
    controller.stop().await;
}

#[tokio::test]
async fn a_cancelled_move_ends_its_watch() {
    let dir = tempfile::tempdir().unwrap();
    let controller = start(dir.path()).await;
    let client = controller.client();
    let _source = agent(&controller, "h1").await;
    client.apply(&request("shop", 1)).await.unwrap();
    until(&controller, "shop/db-1", "running").await;
    let _destination = agent(&controller, "h2").await;
    let begun = client.migrate(&"shop/db-1".parse().unwrap(), &MigrateRequest::default()).await.unwrap();
    let mut lines = client.watch_move(&begun.id).await.unwrap();
    assert!(!within(lines.next()).await.unwrap().unwrap().outcome.over());
    client.cancel_move(&begun.id).await.unwrap();
    let last = loop {
        let line = within(lines.next()).await.unwrap().unwrap();
        if line.outcome.over() {
            break line;
        }
    };
    assert!(matches!(&last.outcome, Outcome::Failed { reason, .. } if reason.contains("cancelled")), "{last:?}");
    assert!(within(lines.next()).await.is_none());
    controller.stop().await;
}
