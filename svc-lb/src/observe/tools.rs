//! What kube-proxy tells tools of this node, where they look for it: `/proxyMode` and `/configz` (SEMANTICS H5).

use std::net::SocketAddr;

use axum::Router;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse as _;
use axum::routing::get;
use serde_json::{Value, json};

use crate::health::listen;

/// What `/proxyMode` says; kube-proxy says `iptables`, `ipvs` or `nftables`.
const MODE: &str = "svc-lb";

/// Serves until it is dropped. `settings` is what each setting is.
pub async fn serve(at: SocketAddr, settings: Value) {
    listen::keep_serving("--metrics-bind-address", at, router(&settings), drop).await;
}

fn router(settings: &Value) -> Router {
    let text = json!({"svc-lb.io": settings}).to_string();
    let configz = ([(CONTENT_TYPE, "application/json")], text);
    Router::new().route("/proxyMode", get(async || MODE)).route(
        "/configz",
        get(move || {
            let answer = configz.clone().into_response();
            async { answer }
        }),
    )
}

#[cfg(test)]
mod tests {
    use axum::body::{Body, to_bytes};
    use axum::http::Request;
    use tower::ServiceExt as _;

    use super::*;

    /// H5: what kube-proxy answers at the same places, for this proxy.
    #[tokio::test]
    async fn tools_learn_mode_and_settings() {
        let ask = async |path: &str| {
            let request = Request::get(path).body(Body::empty()).unwrap();
            let answer = router(&json!({"xdp": "off"}))
                .oneshot(request)
                .await
                .unwrap();
            let bytes = to_bytes(answer.into_body(), 1 << 10).await.unwrap();
            String::from_utf8(bytes.to_vec()).unwrap()
        };
        assert_eq!(ask("/proxyMode").await, "svc-lb");
        assert_eq!(ask("/configz").await, r#"{"svc-lb.io":{"xdp":"off"}}"#);
    }
}
