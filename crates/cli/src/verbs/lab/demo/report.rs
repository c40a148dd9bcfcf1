//! What was measured: as JSON for programs, as a table for people.

use std::collections::BTreeMap;

use godwit_model::Bytes;
use godwit_model::migration::DowntimePart;
use serde::Serialize;

use crate::human;
use crate::printer::Printer;
use crate::table::table;

/// Three programs, around three hosts.
const MOVES: usize = 9;

#[derive(Debug, Serialize)]
pub struct Report {
    pub hosts: u32,
    pub moves: Vec<MoveReport>,
    /// What of the lab is still there after its removal, a line each.
    pub leftovers: Vec<String>,
}

/// One move. Errors and reconnects are those of the client, whose connections span all moves of one container.
#[derive(Debug, Clone, Serialize)]
pub struct MoveReport {
    pub container: String,
    pub program: &'static str,
    pub from: String,
    pub to: String,
    /// Resident before the move, memory that processes share counted once.
    pub rss_bytes: u64,
    pub volume_bytes: u64,
    pub total_ms: f64,
    pub downtime_ms: f64,
    pub downtime_parts: BTreeMap<DowntimePart, f64>,
    /// The longest silence on one connection from the request on to the next move, or to the client's end.
    pub client_gap_ms: f64,
    /// Answered in that time; for nginx the one request that spans all moves.
    pub requests: u64,
    pub errors: u64,
    pub reconnects: u64,
    /// By the move, from host to host.
    pub bytes_sent: u64,
    pub same_process: bool,
    pub same_address: bool,
}

impl Report {
    pub fn new(hosts: u32) -> Self {
        Self { hosts, moves: Vec::new(), leftovers: Vec::new() }
    }

    /// A sentence for each thing that is not as it should be.
    pub fn problems(&self) -> Vec<String> {
        let mut all = Vec::new();
        if self.moves.len() != MOVES {
            all.push(format!("{} of {MOVES} moves were measured", self.moves.len()));
        }
        for one in &self.moves {
            let mut wrong = |is: bool, what: String| {
                if is {
                    all.push(format!("{} from {} to {}: {what}", one.container, one.from, one.to));
                }
            };
            wrong(one.errors > 0, human::count(one.errors as usize, "error"));
            wrong(one.reconnects > 0, human::count(one.reconnects as usize, "lost connection"));
            wrong(one.requests == 0, "no request was answered".to_owned());
            wrong(!one.same_process, "not the same process".to_owned());
            wrong(!one.same_address, "not the same address".to_owned());
        }
        all.extend(self.leftovers.iter().map(|left| format!("still there: {left}")));
        all
    }

    pub fn table(&self, printer: &Printer) -> String {
        let head = ["CONTAINER", "MOVE", "MEMORY", "FILES", "TOTAL", "DOWNTIME", "CLIENT GAP", "REQUESTS", "ERRORS"];
        let rows = self.moves.iter().map(|one| {
            let errors = one.errors + one.reconnects;
            vec![
                one.container.clone(),
                format!("{} → {}", one.from, one.to),
                Bytes(one.rss_bytes).to_string(),
                if one.volume_bytes == 0 { human::NOTHING.to_owned() } else { Bytes(one.volume_bytes).to_string() },
                human::millis(one.total_ms),
                human::millis(one.downtime_ms),
                human::millis(one.client_gap_ms),
                one.requests.to_string(),
                errors.to_string(),
            ]
        });
        table(printer, &head, rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> MoveReport {
        MoveReport {
            container: "shop/cache-1".to_owned(),
            program: "redis",
            from: "h1".to_owned(),
            to: "h2".to_owned(),
            rss_bytes: 1 << 30,
            volume_bytes: 0,
            total_ms: 2_000.0,
            downtime_ms: 80.0,
            downtime_parts: BTreeMap::from([(DowntimePart::HandOver, 2.0)]),
            client_gap_ms: 85.0,
            requests: 7,
            errors: 0,
            reconnects: 0,
            bytes_sent: 1,
            same_process: true,
            same_address: true,
        }
    }

    #[test]
    fn everything_that_is_wrong_is_a_problem() {
        let mut report = Report { hosts: 3, moves: vec![good(); MOVES], leftovers: Vec::new() };
        assert_eq!(report.problems(), Vec::<String>::new());
        report.leftovers.push("process 7 x".to_owned());
        report.moves[0].errors = 1;
        report.moves[1].reconnects = 2;
        report.moves[2].requests = 0;
        report.moves[3].same_process = false;
        report.moves[4].same_address = false;
        report.moves.pop();
        assert_eq!(report.problems().len(), 7);
    }

    #[test]
    fn the_json_has_the_parts_by_name() {
        let json = serde_json::to_value(good()).unwrap_or_default();
        assert_eq!(json["downtime_parts"]["hand-over"], 2.0);
        assert_eq!(json["same_address"], true);
    }
}
