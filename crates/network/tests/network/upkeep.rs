//! Applying twice changes nothing, what is no longer wanted goes, and a new process adopts what an old one left.

use godwit_network::{HostNetwork, HostNetworkConfig, NetworkError};

use crate::lab::{Environment, Host, World, apply, is_root};
use crate::talk::{Server, Talkers, assert_complete, stage};

/// Everything the kernel knows about us, without counters and ages.
fn picture(host: &Host) -> Vec<String> {
    let links = host.space.sh("ip -d -o link show");
    let links = links.lines().map(|line| line.split("qdisc").next().unwrap_or(line).to_owned());
    let mut picture: Vec<String> = links.collect();
    let sorted = |text: String| {
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        lines.sort_unstable();
        lines.join("\n")
    };
    for line in ["bridge fdb show", "ip -o addr show", "ip neigh show nud permanent", "ip route show"] {
        picture.push(sorted(host.space.sh(line)));
    }
    picture.push(host.rules());
    picture
}

#[test]
fn applying_again_changes_nothing() {
    if !is_root() {
        return;
    }
    let world = World::new(2);
    let mut env = Environment::new(81);
    env.start(&world, 0, &["a"]);
    env.start(&world, 1, &["b"]);
    apply(&world, &[&env]);
    let host = &world.hosts[0];
    let before = picture(host);
    assert!(before.iter().any(|part| part.contains("gwb81")), "{before:?}");
    host.apply(&[env.view(&world, 0)]);
    assert_eq!(picture(host), before);
    // A new process finds ports by what the kernel kept.
    let config = HostNetworkConfig { tunnel_address: host.address, uplink: Some("eth0".into()), resolvers: vec![] };
    let view = env.view(&world, 0);
    // The old process is gone first: its responder holds the gateway's port 53.
    let mut old = vec![view.clone()];
    old.clear();
    let errors = host.on(|_| async move {
        let network = HostNetwork::open(config).await.unwrap();
        network.apply(&[view]).await
    });
    assert!(matches!(errors.as_slice(), [NetworkError::Names { .. }]), "{errors:?}");
    assert_eq!(picture(host), before);
    // What somebody destroyed is there again after the next apply.
    host.space.sh("nft flush ruleset");
    host.space.sh("ip link del gwx81");
    host.space.sh("ip addr flush dev gwb81");
    assert!(env.containers[0].space.no_answer_from(env.containers[1].port.address));
    host.apply(&[env.view(&world, 0)]);
    // It may take a second: the container asked for its neighbour in vain, and asks again once a second.
    assert!(env.containers[0].space.pings(env.containers[1].port.address));
}

/// Not even one frame: what is right already is not written again.
#[test]
fn applying_again_disturbs_no_traffic() {
    if !is_root() {
        return;
    }
    let world = World::new(3);
    let env = stage(&world, 95);
    let server = Server::start(Server::bind(&env.containers[0].space));
    let talkers = Talkers::start(&world, &env);
    talkers.wait_for_answers();
    for _ in 0..20 {
        for (number, host) in world.hosts.iter().enumerate() {
            host.apply(&[env.view(&world, number)]);
        }
    }
    talkers.wait_for_answers();
    assert_complete(talkers.finish(vec![], server), "applying again");
}

/// Each reads the kernel's lists, one of which at a time can be read; some callers give up in the middle.
#[test]
fn calls_at_the_same_time_are_not_in_each_others_way() {
    if !is_root() {
        return;
    }
    let world = World::new(1);
    let mut env = Environment::new(96);
    env.start(&world, 0, &[]);
    apply(&world, &[&env]);
    let view = env.view(&world, 0);
    world.hosts[0].on(|network| async move {
        let look =
            |network: HostNetwork| async move { network.leftovers().await.map(drop).map_err(|error| vec![error]) };
        for _ in 0..20 {
            let (applying, view) = (network.clone(), view.clone());
            let lookers: Vec<_> = (0..8).map(|_| tokio::spawn(look(network.clone()))).collect();
            let applier = tokio::spawn(async move { applying.apply(&[view]).await });
            tokio::task::yield_now().await;
            for (number, looker) in lookers.into_iter().enumerate() {
                if number % 3 == 0 {
                    looker.abort();
                } else {
                    looker.await.unwrap().unwrap();
                }
            }
            assert!(applier.await.unwrap().is_empty());
        }
    });
}

#[test]
fn nothing_is_left_after_removal() {
    if !is_root() {
        return;
    }
    let world = World::new(2);
    let (mut one, mut two) = (Environment::new(82), Environment::new(83));
    one.start(&world, 0, &[]);
    two.start(&world, 0, &[]);
    apply(&world, &[&one, &two]);
    let host = &world.hosts[0];
    let names = || host.on(|network| async move { network.leftovers().await }).unwrap();
    let port = |env: &Environment| format!("gwp{}", env.containers[0].port.id);
    let all =
        ["gwb82", "gwb83", "gwx82", "gwx83", &port(&one), &port(&two), "table bridge godwit", "table inet godwit"];
    let mut all: Vec<String> = all.iter().map(|name| (*name).to_owned()).collect();
    all.sort_unstable();
    assert_eq!(names(), all);
    // One environment less: only its own things go.
    host.apply(&[two.view(&world, 0)]);
    assert!(names().iter().all(|name| !name.contains("82") && *name != port(&one)), "{:?}", names());
    assert!(two.containers[0].space.pings(two.gateway()));
    // Links that merely look like ours stay.
    host.space.sh("ip link add gwbridge type bridge");
    let errors = host.on(|network| async move { network.remove_all().await });
    assert!(errors.is_empty(), "{errors:?}");
    assert_eq!(names(), Vec::<String>::new());
    assert!(host.space.ok("ip link show gwbridge"));
    assert_eq!(host.rules(), "");
}

#[test]
fn a_refused_environment_keeps_what_it_has() {
    if !is_root() {
        return;
    }
    let world = World::new(1);
    let mut env = Environment::new(84);
    env.start(&world, 0, &[]);
    apply(&world, &[&env]);
    let host = &world.hosts[0];
    let before = picture(host);
    let mut wrong = env.view(&world, 0);
    wrong.gateway = [192, 168, 0, 1].into();
    let errors = host.on(|network| async move { network.apply(&[wrong]).await });
    assert!(matches!(errors.as_slice(), [NetworkError::Invalid(_)]), "{errors:?}");
    assert_eq!(picture(host), before);
}
