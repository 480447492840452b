//! Pages of `docs/` that are written from the code are what the code says. `SVC_LB_BLESS=1` writes them.

use std::fs;
use std::path::Path;

use svc_lb::observe::{metrics, outcomes};

fn check(name: &str, expected: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../docs")
        .join(name);
    if std::env::var_os("SVC_LB_BLESS").is_some() {
        fs::write(&path, expected).expect("write the page");
    }
    let found = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        found == expected,
        "docs/{name} is not what the code says: `SVC_LB_BLESS=1 cargo test -p svc-lb --test docs` writes it"
    );
}

#[test]
fn every_metric_is_documented() {
    check("metrics.md", &metrics::documentation());
}

#[test]
fn every_outcome_is_documented_with_what_to_do() {
    check("outcomes.md", &outcomes::documentation());
}
