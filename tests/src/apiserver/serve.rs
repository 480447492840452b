//! Requests and answers.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures::stream;
use serde_json::{Value, json};

use super::store::{Resource, Selector, Snapshot};
use super::{Shared, watch};

/// Query parameters.
pub(super) type Parameters = HashMap<String, String>;

/// Everything that is served.
pub(super) fn router(shared: Arc<Shared>) -> Router {
    let mut router = Router::new();
    for resource in Resource::ALL {
        let answer = move |State(shared): State<Arc<Shared>>,
                           Query(parameters): Query<Parameters>| {
            answer(shared, resource, parameters)
        };
        router = router.route(resource.path(), get(answer));
    }
    let events = "/apis/events.k8s.io/v1/namespaces/{namespace}/events";
    router.route(events, post(create_event)).with_state(shared)
}

async fn create_event(
    State(shared): State<Arc<Shared>>,
    Path(_namespace): Path<String>,
    Json(event): Json<Value>,
) -> Response {
    shared.store().events.push(event.clone());
    (StatusCode::CREATED, Json(event)).into_response()
}

async fn answer(shared: Arc<Shared>, resource: Resource, parameters: Parameters) -> Response {
    shared.late().await;
    if shared.chance(|faults| faults.too_many).is_some() {
        return status(
            429,
            "TooManyRequests",
            "too many requests, please try again later",
            Some(1),
        );
    }
    if let Some(which) = shared.chance(|faults| faults.error) {
        return if which.is_multiple_of(2) {
            status(500, "InternalError", "etcdserver: leader changed", None)
        } else {
            status(
                503,
                "ServiceUnavailable",
                "the server is currently unable to handle the request",
                None,
            )
        };
    }
    let text = |key: &str| {
        parameters
            .get(key)
            .map(String::as_str)
            .filter(|text| !text.is_empty())
    };
    let selector = match Selector::parse(text("labelSelector"), text("fieldSelector")) {
        Ok(selector) => selector,
        Err(error) => return status(400, "BadRequest", &error.to_string(), None),
    };
    if text("watch") == Some("true") {
        return watch::answer(shared, resource, selector, &parameters);
    }
    let limit = text("limit").and_then(|text| text.parse().ok());
    list(
        &shared,
        resource,
        &selector,
        limit.unwrap_or(usize::MAX),
        text("continue"),
    )
}

fn list(
    shared: &Shared,
    resource: Resource,
    selector: &Selector,
    limit: usize,
    token: Option<&str>,
) -> Response {
    let mut store = shared.store();
    let (number, from, snapshot) = match token.map(read_token) {
        None => (None, 0, store.snapshot(resource, selector)),
        Some(Some((number, from))) if let Some(snapshot) = store.kept(number) => {
            (Some(number), from, snapshot)
        }
        Some(_) => {
            let message =
                "The provided continue parameter is too old to display a consistent list result";
            return status(410, "Expired", message, None);
        }
    };
    let to = from.saturating_add(limit).min(snapshot.objects.len());
    let left = snapshot.objects.len() - to;
    let token = (left > 0).then(|| {
        let number = number.unwrap_or_else(|| store.keep(snapshot.clone()));
        format!("{number}:{to}")
    });
    drop(store);
    let version = snapshot.version.to_string();
    let metadata = match token {
        Some(token) => {
            json!({"resourceVersion": version, "continue": token, "remainingItemCount": left})
        }
        None => json!({"resourceVersion": version}),
    };
    let head = format!(
        r#"{{"kind":"{}List","apiVersion":"{}","metadata":{metadata},"items":["#,
        resource.kind(),
        resource.api_version(),
    );
    body(items(head, snapshot, from, to))
}

/// The page, a piece at a time.
fn items(head: String, snapshot: Snapshot, from: usize, to: usize) -> Body {
    let objects = (from..to).map(move |at| {
        let separator = if at == from { "" } else { "," };
        let text = snapshot.objects.get(at).map(|stored| stored.text.as_str());
        format!("{separator}{}", text.unwrap_or_default())
    });
    let pieces = std::iter::once(head)
        .chain(objects)
        .chain(std::iter::once("]}\n".to_owned()));
    Body::from_stream(stream::iter(
        pieces.map(|piece| Ok::<_, Infallible>(Bytes::from(piece))),
    ))
}

fn read_token(token: &str) -> Option<(u64, usize)> {
    let (number, from) = token.split_once(':')?;
    Some((number.parse().ok()?, from.parse().ok()?))
}

pub(super) fn body(body: Body) -> Response {
    ([(CONTENT_TYPE, "application/json")], body).into_response()
}

/// A `Status` that is an answer.
pub(super) fn status(code: u16, reason: &str, message: &str, retry: Option<u32>) -> Response {
    let code_of = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    (code_of, Json(status_object(code, reason, message, retry))).into_response()
}

pub(super) fn status_object(code: u16, reason: &str, message: &str, retry: Option<u32>) -> Value {
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": code,
        "details": {"retryAfterSeconds": retry.unwrap_or(0)},
    })
}
