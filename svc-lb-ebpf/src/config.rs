//! The frozen settings, read field by field so that the verifier sees each as a constant.

use aya_ebpf::Global;
use svc_lb_common::config::Config;

/// Set by the agent before the programs are loaded.
#[unsafe(no_mangle)]
static CONFIG: Global<Config> = Global::new(Config::DEFAULT);

/// Reads one field of [`CONFIG`].
///
/// `Global::load` would copy the whole record at each use.
macro_rules! config {
    ($field:ident $( [$index:literal] )?) => {{
        let config = $crate::config::address();
        // SAFETY: `config` points at the program's own read-only data, which the loader has
        // filled with a valid record. Volatile: the value is not the one known at compile time.
        unsafe { core::ptr::read_volatile(&raw const (*config).$field $( [$index] )?) }
    }};
}

pub(crate) use config;

/// Where [`CONFIG`] lies.
#[inline(always)]
pub(crate) fn address() -> *const Config {
    (&raw const CONFIG).cast()
}

/// Whether a bit of [`Config::bits`] is set.
#[inline(always)]
pub(crate) fn enabled(bit: u32) -> bool {
    config!(bits) & bit != 0
}
