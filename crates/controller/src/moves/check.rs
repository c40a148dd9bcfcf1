//! Whether a container may be moved as it is now. Where to, the rules of placement say.

use godwit_model::container::{ContainerState, ContainerStatus, Movable};

/// What speaks against moving the container as it is now; `seen` is newer than its status.
pub fn of_container(status: Option<&ContainerStatus>, seen: Option<&Movable>) -> Vec<String> {
    let Some(status) = status else { return vec!["its host has not reported it yet".to_owned()] };
    let mut because = Vec::new();
    if status.state != ContainerState::Running {
        because.push(format!("it does not run (it is {})", status.state.as_str()));
    }
    because.extend(seen.unwrap_or(&status.movable).because.iter().cloned());
    because
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_reports_is_not_moved() {
        assert_eq!(of_container(None, None).len(), 1);
    }
}
