//! What the played controller answers to questions about what would happen.

use axum::Json;
use axum::extract::Path;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::migrate;

fn score(of_layer: u32) -> Value {
    json!({
        "of_layer": of_layer, "of_environment": 1, "of_layer_in_zone": 1, "load_tenths": 2, "uses_reserve": false,
        "image_missing": true, "room_bytes": 1u64 << 30, "cpu_free": 9500
    })
}

pub async fn placement(Path((_, name)): Path<(String, String)>) -> Json<Value> {
    let waits = name == "web-2";
    let reasons = json!(["4.00 GiB of memory is reserved for it and 2.00 GiB is free", "it has no label disk=ssd"]);
    let mut out = vec![json!({"host": "h3", "reasons": reasons})];
    if !waits {
        out.insert(0, json!({"host": "h1", "reasons": ["it is there already"]}));
    }
    let fitting = if waits { json!([]) } else { json!([{"host": "h2", "score": score(1)}]) };
    let here = json!({"score": score(0), "broken": ["it has no label zone=west"]});
    Json(json!({
        "hosts": {
            "container": format!("shop/{name}"), "home": (!waits).then_some("h1"), "fitting": fitting, "out": out,
            "unmovable": if name == "db-1" { json!([]) } else { json!(["shop/api-1 must be near it"]) }
        },
        "here": (!waits).then_some(here)
    }))
}

pub async fn plan_move(Json(request): Json<Value>) -> Response {
    if request["to"] == "h9" {
        return migrate(Json(request)).await;
    }
    let reasons = json!(["0 of its layer and 1 of its environment are there", "6.50 GiB of memory is free there"]);
    let plan = json!({"container": "shop/db-1", "from": "h1", "to": "h2", "score": score(0), "reasons": reasons});
    Json(plan).into_response()
}

/// Only a dry run: nothing here is emptied.
pub async fn evacuate(Path(host): Path<String>, Json(request): Json<Value>) -> Json<Value> {
    assert_eq!(request["dry_run"], true);
    let step = json!({
        "container": "shop/db-1", "from": host, "to": "h2", "how": "live", "after": [], "wave": 0, "unit": null,
        "bytes": 512u64 << 20, "downtime_ms": 90, "estimated_ms": 5300, "reasons": ["2.00 GiB of memory is free there"]
    });
    let plan = json!({
        "host": host, "steps": [step], "parallel": request["options"]["parallel"], "bytes": 512u64 << 20,
        "estimated_ms": 5300, "keeps_deadline": null,
        "stays": [{"container": "shop/web-1", "reasons": ["it mounts /srv/www of its host"]}]
    });
    Json(json!({"plan": plan, "since": 7}))
}

pub fn lost() -> Value {
    let start = json!({
        "container": "shop/web-1", "to": "h2", "after": [], "recreates_volumes": true,
        "reasons": ["2.00 GiB of memory is free there"]
    });
    let stay = json!({"container": "shop/db-1", "reasons": ["its volumes are on h1; it is not started without them"]});
    json!({"host": "h1", "starts": [start], "stays": [stay]})
}
