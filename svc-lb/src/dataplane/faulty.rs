//! Any dataplane, made unreliable: operations fail by seed, before, halfway or after.

use std::cell::Cell;

use svc_lb_common::Family;
use svc_lb_common::hash::{M1, mix};

use super::{
    BackendRecord, Dataplane, DataplaneError, FlowEntry, FrontendAt, FrontendValue, GuardBit,
    Result, ServiceWord, Sizes, Snapshot, SourceRange,
};

/// A dataplane whose operations fail with a chance of `rate` in 1,024, drawn from a seed.
///
/// A failed batch was not done, done by half or done in full; the caller cannot tell.
#[derive(Debug)]
pub struct Faulty<D> {
    inner: D,
    rate: Cell<u32>,
    state: Cell<u64>,
}

/// What becomes of one operation.
#[derive(Clone, Copy)]
enum Fault {
    None,
    /// Fails after this share of the batch, in halves.
    After {
        halves: usize,
    },
}

impl<D: Dataplane> Faulty<D> {
    /// Wraps `inner`; the same seed fails the same operations.
    pub const fn new(inner: D, seed: u64, rate: u32) -> Self {
        Self {
            inner,
            rate: Cell::new(rate),
            state: Cell::new(seed),
        }
    }

    /// Changes the chance; 0 makes the dataplane reliable.
    pub fn set_rate(&self, rate: u32) {
        self.rate.set(rate);
    }

    /// The dataplane behind.
    pub const fn inner(&self) -> &D {
        &self.inner
    }

    /// The dataplane behind, past the faults.
    pub const fn inner_mut(&mut self) -> &mut D {
        &mut self.inner
    }

    /// Gives the dataplane behind back.
    pub fn into_inner(self) -> D {
        self.inner
    }

    fn draw(&self) -> Fault {
        let state = self.state.get().wrapping_add(M1);
        self.state.set(state);
        let random = mix(state);
        if random % 1024 >= u64::from(self.rate.get()) {
            return Fault::None;
        }
        Fault::After {
            halves: (random >> 32) as usize % 3,
        }
    }

    /// Runs `operate` over all of the batch, or over a part of it and then fails.
    fn attempt<T>(
        &mut self,
        operation: &'static str,
        object: &'static str,
        batch: &[T],
        operate: impl FnOnce(&mut D, &[T]) -> Result<()>,
    ) -> Result<()> {
        let Fault::After { halves } = self.draw() else {
            return operate(&mut self.inner, batch);
        };
        let done = batch.len() * halves / 2;
        if let Some(part) = batch.get(..done).filter(|part| !part.is_empty()) {
            operate(&mut self.inner, part)?;
        }
        Err(DataplaneError::Injected { operation, object })
    }
}

impl<D: Dataplane> Dataplane for Faulty<D> {
    fn sizes(&self) -> Sizes {
        self.inner.sizes()
    }

    fn set_guard(&mut self, bits: &[GuardBit]) -> Result<()> {
        self.attempt("set", "guard", bits, D::set_guard)
    }

    fn clear_guard(&mut self, bits: &[GuardBit]) -> Result<()> {
        self.attempt("clear", "guard", bits, D::clear_guard)
    }

    fn put_backends(&mut self, family: Family, backends: &[(u32, BackendRecord)]) -> Result<()> {
        self.attempt("fill", "backends", backends, |inner, backends| {
            inner.put_backends(family, backends)
        })
    }

    fn put_backend_meta(&mut self, family: Family, metas: &[(u32, u64)]) -> Result<()> {
        self.attempt("store", "backends", metas, |inner, metas| {
            inner.put_backend_meta(family, metas)
        })
    }

    fn put_slots(&mut self, start: u32, ids: &[u32]) -> Result<()> {
        self.attempt("fill", "slots", ids, |inner, ids| {
            inner.put_slots(start, ids)
        })
    }

    fn store_service(&mut self, index: u32, word: ServiceWord, value: u64) -> Result<()> {
        self.attempt("store", "services", &[value], |inner, _| {
            inner.store_service(index, word, value)
        })
    }

    fn put_frontends(
        &mut self,
        family: Family,
        frontends: &[(FrontendAt, FrontendValue)],
    ) -> Result<()> {
        self.attempt("update", "frontends", frontends, |inner, frontends| {
            inner.put_frontends(family, frontends)
        })
    }

    fn delete_frontends(&mut self, family: Family, frontends: &[FrontendAt]) -> Result<()> {
        self.attempt("delete from", "frontends", frontends, |inner, frontends| {
            inner.delete_frontends(family, frontends)
        })
    }

    fn put_source_ranges(&mut self, family: Family, ranges: &[SourceRange]) -> Result<()> {
        self.attempt("update", "source ranges", ranges, |inner, ranges| {
            inner.put_source_ranges(family, ranges)
        })
    }

    fn delete_source_ranges(&mut self, family: Family, ranges: &[SourceRange]) -> Result<()> {
        self.attempt("delete from", "source ranges", ranges, |inner, ranges| {
            inner.delete_source_ranges(family, ranges)
        })
    }

    fn snapshot(&self) -> Result<Snapshot> {
        self.inner.snapshot()
    }

    fn grace(&self) -> Result<()> {
        self.inner.grace()?;
        match self.draw() {
            Fault::None => Ok(()),
            Fault::After { .. } => Err(DataplaneError::Injected {
                operation: "wait for",
                object: "programs",
            }),
        }
    }

    fn visit_flows(&self, visit: &mut dyn FnMut(&FlowEntry)) -> Result<()> {
        self.inner.visit_flows(visit)?;
        match self.draw() {
            Fault::None => Ok(()),
            Fault::After { .. } => Err(DataplaneError::Injected {
                operation: "read",
                object: "flows",
            }),
        }
    }
}
