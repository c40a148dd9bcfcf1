//! Containers and load spread over hosts: what is advised, and what is made of it.

use godwit_api::client::Client;
use godwit_api::types::{BalanceChange, BalanceMode, BalanceView, EvacuateRequest};
use godwit_model::event::{Event, EventKind};

use crate::agent::{Agent, again, agent, let_moves_succeed, until};
use crate::controller::{Controller, refusal, request, start, within};

fn mode(mode: BalanceMode) -> BalanceChange {
    BalanceChange { mode: Some(mode), ..BalanceChange::default() }
}

/// The next event of this kind after `since`.
async fn event(client: &Client, since: u64, kind: EventKind) -> Event {
    let mut events = client.events(Some(since), true).await.unwrap();
    let found = async {
        loop {
            let event = events.next().await.unwrap().unwrap();
            if event.kind == kind {
                return event;
            }
        }
    };
    within(found).await
}

/// Looks until balance is as wished: what is measured makes no events.
async fn wait_for(client: &Client, wished: impl Fn(&BalanceView) -> bool) -> BalanceView {
    let reached = async {
        loop {
            let view = client.balance().await.unwrap();
            if wished(&view) {
                return view;
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    within(reached).await
}

async fn on(client: &Client, host: &str) -> usize {
    let all = client.containers(None).await.unwrap();
    all.iter().filter(|c| c.host.as_ref().is_some_and(|h| h.as_str() == host)).count()
}

/// Six containers of one layer on two hosts.
async fn begin(controller: &Controller) -> (Client, Agent, Agent) {
    let client = controller.client();
    let (h1, h2) = (agent(controller, "h1").await, agent(controller, "h2").await);
    client.apply(&request("shop", 6)).await.unwrap();
    for number in 1..=6 {
        until(controller, &format!("shop/db-{number}"), "running").await;
    }
    assert_eq!((on(&client, "h1").await, on(&client, "h2").await), (3, 3));
    (client, h1, h2)
}

#[tokio::test]
async fn automatic_fills_a_new_host_with_no_move_too_many() {
    let dir = tempfile::tempdir().unwrap();
    let controller = start(dir.path()).await;
    let (client, mut h1, mut h2) = begin(&controller).await;
    // No rest: what keeps it quiet is that nothing is better.
    let change = BalanceChange { rest_ms: Some(0), at_once: Some(2), ..mode(BalanceMode::Automatic) };
    assert!(client.change_balance(&change).await.unwrap().advice.moves.is_empty());
    let mut h3 = agent(&controller, "h3").await;
    let_moves_succeed(&mut [&mut h1, &mut h2, &mut h3]);
    let done = event(&client, 0, EventKind::BalanceDone).await;
    assert_eq!(done.message, "2 moves were made for balance; nothing more would make the fleet better");
    for host in ["h1", "h2", "h3"] {
        assert_eq!(on(&client, host).await, 2);
    }
    let moves = client.moves().await.unwrap();
    let why: Vec<String> = moves.iter().map(|m| m.why()).collect();
    assert!(moves.len() == 2 && why.iter().all(|why| why.starts_with(": balance: spread: beside it are 2")), "{why:?}");
    // Advice follows from the fleet alone: as long as that stays as it is, there is none.
    let view = client.balance().await.unwrap();
    assert!(view.advice.moves.is_empty() && view.waits.is_none() && view.under_way == 0, "{view:?}");
    assert_eq!(client.moves().await.unwrap().len(), 2);
    controller.stop().await;
}

#[tokio::test]
async fn advice_is_told_and_carried_out_once_and_who_moved_rests_across_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let controller = start(dir.path()).await;
    let (client, mut h1, mut h2) = begin(&controller).await;
    let mut h3 = agent(&controller, "h3").await;
    let told = event(&client, 0, EventKind::BalanceAdvised).await;
    assert!(told.message.starts_with("2 moves would make the fleet better"), "{told:?}");
    let view = client.balance().await.unwrap();
    assert_eq!((view.mode, view.advice.moves.len()), (BalanceMode::Advise, 2));
    assert!(client.moves().await.unwrap().is_empty());

    let_moves_succeed(&mut [&mut h1, &mut h2, &mut h3]);
    let answer = client.balance_now().await.unwrap();
    event(&client, answer.since, EventKind::BalanceDone).await;
    assert_eq!(on(&client, "h3").await, 2);
    assert_eq!(client.balance().await.unwrap().once, None);
    let moved: Vec<_> = client.moves().await.unwrap().into_iter().map(|m| m.name).collect();
    assert_eq!(moved.len(), 2);

    controller.stop().await;
    let controller = start(dir.path()).await;
    let client = controller.client();
    let _hosts = [again(&controller, h1).await, again(&controller, h2).await, again(&controller, h3).await];
    let _h4 = agent(&controller, "h4").await;
    let view = wait_for(&client, |view| !view.advice.moves.is_empty()).await;
    assert!(view.advice.moves.iter().all(|advised| !moved.contains(&advised.step.container)), "{view:?}");
    // Asked for once, done once.
    assert_eq!(client.moves().await.unwrap().len(), 2);
    controller.stop().await;
}

#[tokio::test]
async fn nothing_is_moved_for_balance_while_a_host_is_emptied() {
    let dir = tempfile::tempdir().unwrap();
    let controller = start(dir.path()).await;
    let (client, _h1, _h2) = begin(&controller).await;
    let _h3 = agent(&controller, "h3").await;
    // The played hosts begin the moves and never end them.
    client.evacuate(&"h1".parse().unwrap(), &EvacuateRequest::default()).await.unwrap();
    let view = client.balance().await.unwrap();
    assert_eq!(view.waits.as_deref(), Some("h1 is being emptied"));
    let (status, body) = refusal(client.balance_now().await);
    assert!(status == 409 && body.error.contains("h1 is being emptied"), "{body:?}");
    controller.stop().await;
}

#[tokio::test]
async fn a_policy_is_kept_and_a_wrong_one_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let controller = start(dir.path()).await;
    let client = controller.client();
    let before = client.balance().await.unwrap();
    let bad = BalanceChange { least_gain_permille: Some(1001), ..mode(BalanceMode::Off) };
    let (status, body) = refusal(client.change_balance(&bad).await);
    assert!(
        status == 422 && body.error.contains("the least gain, in thousandths, has to be from 0 to 1000"),
        "{body:?}"
    );
    assert_eq!(client.balance().await.unwrap(), before);
    let change = BalanceChange { rest_ms: Some(7), at_once: Some(3), ..mode(BalanceMode::Off) };
    let changed = client.change_balance(&change).await.unwrap();
    assert_eq!((changed.mode, changed.policy.rest_ms, changed.at_once), (BalanceMode::Off, 7, 3));
    assert_eq!(changed.policy.hold_ms, before.policy.hold_ms);
    controller.stop().await;
    let controller = start(dir.path()).await;
    assert_eq!(controller.client().balance().await.unwrap(), changed);
    controller.stop().await;
}

/// What is under way counts as done: else h1 would look full until its containers are gone, and would give too many.
#[tokio::test]
async fn a_full_host_gives_half_to_an_empty_one_and_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let controller = start(dir.path()).await;
    let client = controller.client();
    let mut h1 = agent(&controller, "h1").await;
    for env in ["a", "b", "c", "d"] {
        crate::room::apply(&client, env, 2).await;
        until(&controller, &format!("{env}/x-1"), "running").await;
    }
    let change = BalanceChange { rest_ms: Some(0), at_once: Some(3), ..mode(BalanceMode::Automatic) };
    client.change_balance(&change).await.unwrap();
    let mut h2 = agent(&controller, "h2").await;
    let view = wait_for(&client, |view| view.under_way == 2).await;
    assert!(view.advice.moves.is_empty(), "{view:?}");
    let_moves_succeed(&mut [&mut h1, &mut h2]);
    let done = event(&client, 0, EventKind::BalanceDone).await;
    assert_eq!(done.message, "2 moves were made for balance; nothing more would make the fleet better");
    assert_eq!((on(&client, "h1").await, on(&client, "h2").await), (2, 2));
    let moves = client.moves().await.unwrap();
    assert!(moves.len() == 2 && moves[0].why().starts_with(": balance: level: h1 is full to 1000‰"), "{moves:?}");
    controller.stop().await;
}

/// Two busy containers on one host: one of them goes, and that is all.
#[tokio::test]
async fn an_overloaded_host_gives_away_what_is_too_much() {
    let dir = tempfile::tempdir().unwrap();
    let controller = start(dir.path()).await;
    let client = controller.client();
    let mut h1 = agent(&controller, "h1").await;
    for env in ["a", "b"] {
        client.apply(&request(env, 1)).await.unwrap();
        until(&controller, &format!("{env}/db-1"), "running").await;
    }
    let mut h2 = agent(&controller, "h2").await;
    // Each 1.8 of 4 cores, wherever it is.
    for agent in [&h1, &h2] {
        agent.busy.lock().unwrap().extend([("a/db-1".to_owned(), 1_800), ("b/db-1".to_owned(), 1_800)]);
    }
    let_moves_succeed(&mut [&mut h1, &mut h2]);
    let change = BalanceChange { hold_ms: Some(1_000), rest_ms: Some(0), ..mode(BalanceMode::Automatic) };
    client.change_balance(&change).await.unwrap();
    let done = event(&client, 0, EventKind::BalanceDone).await;
    assert_eq!(done.message, "1 move was made for balance; nothing more would make the fleet better");
    let moves = client.moves().await.unwrap();
    assert!(moves[0].why().starts_with(": balance: overload: h1 is full to "), "{}", moves[0].why());
    // Measured on both hosts, neither has too much to do.
    let even = |view: &BalanceView| view.hosts.iter().all(|host| (400..500).contains(&host.cpu_permille));
    let view = wait_for(&client, even).await;
    assert!(view.advice.moves.is_empty() && view.hosts.iter().all(|h| h.overloaded_ms.is_none()), "{view:?}");
    assert_eq!(client.moves().await.unwrap().len(), 1);
    controller.stop().await;
}
