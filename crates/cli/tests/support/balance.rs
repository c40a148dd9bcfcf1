//! What the played controller says of balance.

use axum::Json;
use axum::extract::Json as Body;
use serde_json::{Value, json};

fn policy(cpu_permille: u64) -> Value {
    json!({
        "cpu_threshold_permille": cpu_permille, "memory_threshold_permille": 900, "hold_ms": 300_000,
        "level_permille": 400, "least_gain_permille": 50, "rest_ms": 1_800_000, "max_moves": 20
    })
}

fn step(container: &str, after: &[usize], reason: &str) -> Value {
    json!({
        "container": container, "from": "h1", "to": "h2", "how": "live", "after": after, "wave": after.len(),
        "unit": null, "bytes": 64 << 20, "downtime_ms": 40, "estimated_ms": 1_500, "reasons": [reason]
    })
}

fn advice() -> Value {
    let spread = "beside it are 1 of its layer and 1 of its environment, 1 of its layer in the zone; there 0, 0 and 0";
    json!({
        "moves": [
            {"step": step("shop/db-2", &[], spread), "purpose": "spread", "gain": 1, "cost": 104},
            {"step": step("shop/web-1", &[0], "h1 is full to 912‰, h2 will be to 455‰"), "purpose": "overload",
             "gain": 457, "cost": 64}
        ],
        "more": true
    })
}

pub fn view(mode: &str, cpu_permille: u64) -> Value {
    json!({
        "mode": mode, "policy": policy(cpu_permille), "at_once": 2, "advice": advice(), "waits": null,
        "under_way": 1, "once": null,
        "hosts": [
            {"host": "h1", "cpu_permille": 912, "memory_permille": 304, "overloaded_ms": 423_000},
            {"host": "h2", "cpu_permille": 0, "memory_permille": 15, "overloaded_ms": null}
        ]
    })
}

pub async fn change(Body(change): Body<Value>) -> Json<Value> {
    let threshold = change["cpu_threshold_permille"].as_u64().unwrap_or(850);
    Json(view(change["mode"].as_str().unwrap_or("advise"), threshold))
}

pub async fn now() -> Json<Value> {
    Json(json!({"advice": advice(), "since": 1}))
}
