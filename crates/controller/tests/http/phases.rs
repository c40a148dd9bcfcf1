//! A move's phases under words in any order: from both sides, from the wrong side, twice, too late, and a person who
//! cancels in between. Whatever is said, one host owns the container, and what is handed over is never taken back.

use std::sync::{Arc, Mutex};

use godwit_api::link::{FromAgent, Request};
use godwit_api::types::{ErrorBody, MigrateRequest};
use godwit_model::MoveId;
use godwit_model::migration::{Move, Outcome, Phase, Progress};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use tokio::sync::{mpsc, watch};

use crate::agent::{agent, until};
use crate::controller::{request, start, within};

/// Moves played, one after the other, of one container.
const MOVES: usize = 40;
/// Words said during one of them, at the most.
const WORDS: usize = 8;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Word {
    Frozen { source: bool },
    Ready { source: bool },
    Failed { source: bool },
    Progress { source: bool, bytes: u64 },
    OfAnotherMove,
    Cancel,
}

fn words() -> impl Strategy<Value = Vec<Word>> {
    let word = prop_oneof![
        2 => any::<bool>().prop_map(|source| Word::Frozen { source }),
        2 => any::<bool>().prop_map(|source| Word::Ready { source }),
        1 => any::<bool>().prop_map(|source| Word::Failed { source }),
        2 => (any::<bool>(), 0..1000u64).prop_map(|(source, bytes)| Word::Progress { source, bytes }),
        1 => Just(Word::OfAnotherMove),
        1 => Just(Word::Cancel),
    ];
    prop::collection::vec(word, 0..WORDS)
}

pub fn ready(id: MoveId) -> FromAgent {
    let (bytes_received, memory_bytes, file_bytes, rounds) = (3, 2, 1, 1);
    let (parts, since_freeze_ms, stood_still) = (Vec::new(), 1.0, None);
    let (slowed_to_percent, late_bytes, paused_ms) = (None, 0, None);
    FromAgent::MoveReady {
        id,
        parts,
        since_freeze_ms,
        bytes_received,
        memory_bytes,
        file_bytes,
        rounds,
        slowed_to_percent,
        late_bytes,
        stood_still,
        paused_ms,
    }
}

fn failed(id: MoveId) -> FromAgent {
    FromAgent::MoveFailed { id, phase: Phase::Copy, error: ErrorBody::new("a word of the test") }
}

/// What the two agents were asked, in the order in which it was seen.
#[derive(Clone)]
struct Asked {
    all: Arc<Mutex<Vec<(&'static str, Request)>>>,
    more: watch::Sender<()>,
}

impl Asked {
    fn collect(&self, host: &'static str, mut asked: mpsc::Receiver<Request>) {
        let this = self.clone();
        tokio::spawn(async move {
            while let Some(request) = asked.recv().await {
                this.all.lock().unwrap().push((host, request));
                this.more.send_replace(());
            }
        });
    }

    fn of(&self, wanted: &MoveId) -> Vec<(&'static str, Request)> {
        let is_of = |request: &Request| match request {
            Request::PrepareMove { id, .. }
            | Request::StartMove { id, .. }
            | Request::ActivateMove { id, .. }
            | Request::ReleaseMove { id }
            | Request::AbortMove { id, .. } => id == wanted,
            _ => false,
        };
        self.all.lock().unwrap().iter().filter(|(_, request)| is_of(request)).cloned().collect()
    }

    async fn started(&self, id: &MoveId) {
        let mut more = self.more.subscribe();
        while !self.of(id).iter().any(|(_, request)| matches!(request, Request::StartMove { .. })) {
            more.changed().await.unwrap();
        }
    }
}

/// Where it may go from `before`: forward, and never from a hand-over back.
fn follows(before: &Move, now: &Move) -> bool {
    let forward = matches!(
        (&before.outcome, &now.outcome),
        (Outcome::Moving, _)
            | (Outcome::HandedOver, Outcome::HandedOver | Outcome::Done)
            | (Outcome::Done, Outcome::Done)
    );
    let failed = matches!(now.outcome, Outcome::Failed { .. });
    forward && (failed || (now.phase >= before.phase && now.progress.bytes_sent >= before.progress.bytes_sent))
}

#[tokio::test]
async fn whatever_is_said_one_host_owns_the_container_and_a_hand_over_stands() {
    let dir = tempfile::tempdir().unwrap();
    let controller = start(dir.path()).await;
    let client = controller.client();
    let (mut h1, mut h2) = (agent(&controller, "h1").await, agent(&controller, "h2").await);
    let asked = Asked { all: Arc::default(), more: watch::Sender::new(()) };
    // Their ends of the channels stay with the agents.
    asked.collect("h1", std::mem::replace(&mut h1.asked, mpsc::channel(1).1));
    asked.collect("h2", std::mem::replace(&mut h2.asked, mpsc::channel(1).1));
    client.apply(&request("shop", 1)).await.unwrap();
    let name = "shop/db-1".parse().unwrap();
    let mut runner = TestRunner::deterministic();
    let (mut done, mut taken_back) = (0, 0);
    for _ in 0..MOVES {
        let words = words().new_tree(&mut runner).unwrap().current();
        let before = until(&controller, "shop/db-1", "running").await;
        let begun = client.migrate(&name, &MigrateRequest::default()).await.unwrap();
        assert_eq!(Some(&begun.from), before.host.as_ref());
        let id = begun.id.clone();
        within(asked.started(&id)).await;
        let from_h1 = begun.from.as_str() == "h1";
        let (source, destination) = if from_h1 { (&h1.voice, &h2.voice) } else { (&h2.voice, &h1.voice) };
        let side = |is_source: bool| if is_source { source } else { destination };
        let mut lines = client.watch_move(&id).await.unwrap();
        let play = async {
            for word in &words {
                match *word {
                    Word::Frozen { source } => {
                        side(source).send(FromAgent::MoveFrozen { id: id.clone() }).await.unwrap()
                    }
                    Word::Ready { source } => side(source).send(ready(id.clone())).await.unwrap(),
                    Word::Failed { source } => side(source).send(failed(id.clone())).await.unwrap(),
                    Word::Progress { source, bytes } => {
                        let progress = Progress { bytes_sent: bytes, bytes_total: 1000, rounds: 1 };
                        let (id, phase) = (id.clone(), Phase::Copy);
                        side(source).send(FromAgent::MoveProgress { id, phase, progress }).await.unwrap();
                    }
                    Word::OfAnotherMove => source.send(failed("fafafafafafa".parse().unwrap())).await.unwrap(),
                    // Refused where it is over or handed over.
                    Word::Cancel => drop(client.cancel_move(&id).await),
                }
            }
            // Where nothing has ended it; too late for everything else.
            destination.send(failed(id.clone())).await.unwrap();
        };
        let read = async {
            let mut told = vec![begun.clone()];
            while let Some(line) = within(lines.next()).await {
                let now = line.unwrap();
                assert!(follows(told.last().unwrap(), &now), "{words:?}: {:?} then {now:?}", told.last());
                let view = client.container(&name).await.unwrap();
                let moved = view.generation == before.generation.next();
                assert!(moved || view.generation == before.generation, "{words:?}: {view:?}");
                assert_eq!(view.host.as_ref(), Some(if moved { &begun.to } else { &begun.from }), "{words:?}");
                // Looked at later than the line was written: it can only be further.
                assert!(moved || !matches!(now.outcome, Outcome::HandedOver | Outcome::Done), "{words:?}: {view:?}");
                told.push(now);
            }
            told.pop().unwrap()
        };
        let ((), last) = tokio::join!(play, read);
        let after = client.container(&name).await.unwrap();
        let destination_was_ready = words.contains(&Word::Ready { source: false });
        if last.outcome == Outcome::Done {
            assert!(destination_was_ready, "{words:?}: handed over without the destination's word");
            assert_eq!((after.host, after.generation), (Some(begun.to), before.generation.next()), "{words:?}");
            done += 1;
        } else {
            assert!(matches!(last.outcome, Outcome::Failed { .. }), "{words:?}: {last:?}");
            assert_eq!((after.host, after.generation), (Some(begun.from), before.generation), "{words:?}");
            taken_back += 1;
        }
        assert_eq!(after.moving, None, "{words:?}");
    }
    assert!(done > 3 && taken_back > 3, "{done} moves went through and {taken_back} did not: both shall be played");
    check_requests(&client.moves().await.unwrap(), &asked);
    controller.stop().await;
}

/// What the sides were asked fits to how each move ended.
fn check_requests(moves: &[Move], asked: &Asked) {
    for one in moves {
        let requests = asked.of(&one.id);
        let activated =
            |host: &str| requests.iter().any(|(h, r)| *h == host && matches!(r, Request::ActivateMove { .. }));
        let released =
            |host: &str| requests.iter().any(|(h, r)| *h == host && matches!(r, Request::ReleaseMove { .. }));
        let aborted = requests.iter().any(|(_, r)| matches!(r, Request::AbortMove { .. }));
        let (from, to) = (one.from.as_str(), one.to.as_str());
        assert!(!activated(from) && !released(to), "{one:?}");
        let through = one.outcome == Outcome::Done;
        assert_eq!((activated(to), released(from)), (through, through), "{one:?}");
        assert!(!(through && aborted), "{one:?}");
    }
}
