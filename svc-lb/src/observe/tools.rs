//! What kube-proxy tells tools of this node, where they look for it: `/metrics`, `/proxyMode` and `/configz` (SEMANTICS
//! H4, H5).

use std::net::SocketAddr;

use axum::Router;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse as _;
use axum::routing::get;
use serde_json::{Value, json};

use crate::health::listen;

/// What `/proxyMode` says; kube-proxy says `iptables`, `ipvs` or `nftables`.
const MODE: &str = "svc-lb";
/// The format of `/metrics`.
const PROMETHEUS: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Serves until it is dropped. `settings` is what each setting is; `scrape` gathers the metrics, or says nothing while
/// the agent ends.
pub async fn serve<S, F>(at: SocketAddr, settings: Value, scrape: S)
where
    S: Fn() -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Option<String>> + Send,
{
    let router = router(&settings, scrape);
    listen::keep_serving("--metrics-bind-address", at, router, drop).await;
}

fn router<S, F>(settings: &Value, scrape: S) -> Router
where
    S: Fn() -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Option<String>> + Send,
{
    let text = json!({"svc-lb.io": settings}).to_string();
    let configz = ([(CONTENT_TYPE, "application/json")], text);
    Router::new()
        .route("/proxyMode", get(async || MODE))
        .route(
            "/configz",
            get(move || {
                let answer = configz.clone().into_response();
                async { answer }
            }),
        )
        .route(
            "/metrics",
            get(move || async move {
                match scrape().await {
                    Some(text) => ([(CONTENT_TYPE, PROMETHEUS)], text).into_response(),
                    None => StatusCode::SERVICE_UNAVAILABLE.into_response(),
                }
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
            let scrape = async || Some("svc_lb_ready 1\n".to_owned());
            let answer = router(&json!({"xdp": "off"}), scrape)
                .oneshot(request)
                .await
                .unwrap();
            let bytes = to_bytes(answer.into_body(), 1 << 10).await.unwrap();
            String::from_utf8(bytes.to_vec()).unwrap()
        };
        assert_eq!(ask("/metrics").await, "svc_lb_ready 1\n");
        assert_eq!(ask("/proxyMode").await, "svc-lb");
        assert_eq!(ask("/configz").await, r#"{"svc-lb.io":{"xdp":"off"}}"#);
    }
}
