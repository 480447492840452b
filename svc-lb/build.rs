//! Points the agent at the BPF object it embeds.
//!
//! `cargo xtask build` writes and checks the object at `target/bpf/svc-lb`; the environment variable
//! `SVC_LB_BPF_OBJECT` names another file. Without an object the crate still compiles, for clippy and rustdoc:
//! the cfg `no_bpf_object` is set, and the loader refuses to run.

use std::path::{Path, PathBuf};
use std::{env, fs};

const OBJECT: &str = "SVC_LB_BPF_OBJECT";

fn main() {
    println!("cargo::rustc-check-cfg=cfg(no_bpf_object)");
    println!("cargo::rerun-if-env-changed={OBJECT}");
    let object = match env::var_os(OBJECT) {
        Some(file) => PathBuf::from(file),
        None => built_object(),
    };
    if object.is_file() {
        println!("cargo::rerun-if-changed={}", object.display());
        println!("cargo::rustc-env={OBJECT}={}", object.display());
        return;
    }
    println!("cargo::rustc-cfg=no_bpf_object");
    watch_directory_of(&object);
}

/// Where `cargo xtask build` leaves the object, whatever cargo's own target directory is.
fn built_object() -> PathBuf {
    let package = env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
    Path::new(&package).join("../target/bpf/svc-lb")
}

/// Watches for the object to appear. cargo takes a missing *file* for one that changes on every build, so its
/// directory is watched, and made if needed.
fn watch_directory_of(object: &Path) {
    let Some(dir) = object.parent() else { return };
    if fs::create_dir_all(dir).is_ok() {
        println!("cargo::rerun-if-changed={}", dir.display());
    }
}
