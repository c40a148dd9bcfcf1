//! What earlier moves say about the next one.

use godwit_model::migration::{DowntimePart, Move, Outcome};

use crate::state::World;

/// Moves that are looked at, the newest ones.
const MOVES: usize = 5;

/// For how long `next` will stand still when nothing is left to send, in milliseconds: the median of the container's
/// latest moves, where it has none of all latest ones. `None`: nothing has been moved yet.
pub fn fixed_ms(world: &World, next: &Move) -> Option<f64> {
    let done = world.moves.values().map(|m| &m.value).filter(|m| m.outcome == Outcome::Done);
    let mut done: Vec<&Move> = done.filter(|m| m.summary.is_some()).collect();
    done.sort_by_key(|m| std::cmp::Reverse(m.requested_at_ms));
    let same = |m: &&&Move| m.container == next.container;
    let of = |moves: Vec<&&Move>| median(moves.into_iter().take(MOVES).filter_map(|m| fixed_of(m)).collect());
    of(done.iter().filter(same).collect()).or_else(|| of(done.iter().collect()))
}

/// Everything but sending, which depends on the link and on what there is to send.
fn fixed_of(one: &Move) -> Option<f64> {
    let summary = one.summary.as_ref()?;
    let part = |part| summary.downtime_parts.get(&part).copied().unwrap_or_default();
    let sending = part(DowntimePart::Files) + part(DowntimePart::Transfer);
    // Where memory went through CRIU, the dump is mostly that.
    (summary.rounds > 1).then_some((summary.downtime_ms - sending).max(0.0))
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0]), Some(3.0));
        assert_eq!(median(vec![90.0, 400.0, 80.0]), Some(90.0));
    }
}
