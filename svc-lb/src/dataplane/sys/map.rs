//! Maps, as far as aya has no calls for them: batches, arrays in memory, grace periods.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use aya::Pod;
use aya_obj::generated::{BPF_NOEXIST, bpf_cmd, bpf_map_info, bpf_map_type};

use super::{Info, ObjectKind, bpf, object_kind, owned, raw};

/// Entries that one batch call moves.
const BATCH: usize = 4_096;
/// The kernel's own "not supported", which libc does not name.
const ENOTSUPP: i32 = 524;

/// What a map is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct MapInfo {
    /// Its kind, a `bpf_map_type`.
    pub kind: u32,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value.
    pub value_size: u32,
    /// Number of entries it can hold.
    pub max_entries: u32,
    /// Flags it was made with.
    pub flags: u32,
}

/// Reads what a map is.
///
/// # Errors
/// `InvalidInput` if the descriptor is no map.
pub fn map_info(map: BorrowedFd<'_>) -> io::Result<MapInfo> {
    if object_kind(map)? != ObjectKind::Map {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a map"));
    }
    // SAFETY: plain integers, for which zero is a value.
    let mut info: bpf_map_info = unsafe { std::mem::zeroed() };
    let mut attr = Info {
        fd: raw(map),
        length: u32::try_from(size_of_val(&info)).map_err(io::Error::other)?,
        buffer: (&raw mut info).expose_provenance() as u64,
    };
    // SAFETY: the kernel writes at most `length` bytes to `info`.
    unsafe { bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr) }?;
    Ok(MapInfo {
        kind: info.type_,
        key_size: info.key_size,
        value_size: info.value_size,
        max_entries: info.max_entries,
        flags: info.map_flags,
    })
}

#[repr(C)]
struct MapCreate {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
}

/// Makes an unnamed map, gone with its last descriptor or pin.
pub fn map_create(info: MapInfo) -> io::Result<OwnedFd> {
    let mut attr = MapCreate {
        kind: info.kind,
        key_size: info.key_size,
        value_size: info.value_size,
        max_entries: info.max_entries,
        flags: info.flags,
    };
    // SAFETY: BPF_MAP_CREATE follows no pointer here.
    unsafe { bpf(bpf_cmd::BPF_MAP_CREATE, &mut attr) }.map(owned)
}

#[repr(C)]
struct Element {
    map_fd: u32,
    reserved: u32,
    key: u64,
    value_or_next_key: u64,
    flags: u64,
}

impl Element {
    fn new<K: Pod>(map: BorrowedFd<'_>, key: Option<&K>) -> Self {
        Self {
            map_fd: raw(map),
            reserved: 0,
            key: key.map_or(0, |key| std::ptr::from_ref(key).expose_provenance() as u64),
            value_or_next_key: 0,
            flags: 0,
        }
    }
}

#[repr(C)]
struct BatchCall {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

impl BatchCall {
    fn new(map: BorrowedFd<'_>, count: usize) -> io::Result<Self> {
        Ok(Self {
            in_batch: 0,
            out_batch: 0,
            keys: 0,
            values: 0,
            count: u32::try_from(count).map_err(io::Error::other)?,
            map_fd: raw(map),
            elem_flags: 0,
            flags: 0,
        })
    }
}

/// A map whose keys are `K` and whose values are `V`, not per CPU.
#[derive(Debug)]
pub struct TypedMap<K, V> {
    map: OwnedFd,
    types: PhantomData<(K, V)>,
}

impl<K: Pod, V: Pod> TypedMap<K, V> {
    /// Takes a map.
    ///
    /// # Errors
    /// `InvalidInput` if its keys or values have other sizes.
    pub fn new(map: OwnedFd) -> io::Result<Self> {
        let info = map_info(map.as_fd())?;
        let sizes = (info.key_size as usize, info.value_size as usize);
        if sizes != (size_of::<K>(), size_of::<V>()) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "keys or values of another size",
            ));
        }
        Ok(Self {
            map,
            types: PhantomData,
        })
    }

    /// Inserts or replaces one entry.
    pub fn update(&self, key: &K, value: &V) -> io::Result<()> {
        let mut attr = Element::new(self.map.as_fd(), Some(key));
        attr.value_or_next_key = std::ptr::from_ref(value).expose_provenance() as u64;
        // SAFETY: the kernel reads a key and a value; `new` has compared their sizes.
        unsafe { bpf(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attr) }?;
        Ok(())
    }

    /// Deletes one entry; an absent one is fine.
    pub fn delete(&self, key: &K) -> io::Result<()> {
        let mut attr = Element::new(self.map.as_fd(), Some(key));
        // SAFETY: the kernel reads a key; `new` has compared its size.
        let result = unsafe { bpf(bpf_cmd::BPF_MAP_DELETE_ELEM, &mut attr) };
        absent_is_none(result).map(drop)
    }

    /// Reads one entry.
    pub fn get(&self, key: &K) -> io::Result<Option<V>> {
        let mut value = zeroed::<V>();
        let mut attr = Element::new(self.map.as_fd(), Some(key));
        attr.value_or_next_key = (&raw mut value).expose_provenance() as u64;
        // SAFETY: the kernel reads a key and writes a value; `new` has compared their sizes.
        let result = unsafe { bpf(bpf_cmd::BPF_MAP_LOOKUP_ELEM, &mut attr) };
        Ok(absent_is_none(result)?.map(|_| value))
    }

    fn next_key(&self, key: Option<&K>) -> io::Result<Option<K>> {
        let mut next = zeroed::<K>();
        let mut attr = Element::new(self.map.as_fd(), key);
        attr.value_or_next_key = (&raw mut next).expose_provenance() as u64;
        // SAFETY: the kernel reads a key, where there is one, and writes a key; `new` has compared
        // their size.
        let result = unsafe { bpf(bpf_cmd::BPF_MAP_GET_NEXT_KEY, &mut attr) };
        Ok(absent_is_none(result)?.map(|_| next))
    }

    /// Inserts or replaces entries, in batches where the kernel has them. Those before the one
    /// that fails are done.
    pub fn update_all(&self, keys: &[K], values: &[V]) -> io::Result<()> {
        for (keys, values) in keys.chunks(BATCH).zip(values.chunks(BATCH)) {
            let mut attr = BatchCall::new(self.map.as_fd(), keys.len().min(values.len()))?;
            attr.keys = keys.as_ptr().expose_provenance() as u64;
            attr.values = values.as_ptr().expose_provenance() as u64;
            // SAFETY: the kernel reads `count` keys and values.
            match unsafe { bpf(bpf_cmd::BPF_MAP_UPDATE_BATCH, &mut attr) } {
                Ok(_) => {}
                Err(error) if no_batches(&error) => {
                    for (key, value) in keys.iter().zip(values) {
                        self.update(key, value)?;
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Deletes entries, in batches where the kernel has them; absent ones are fine.
    pub fn delete_all(&self, mut keys: &[K]) -> io::Result<()> {
        while !keys.is_empty() {
            let mut attr = BatchCall::new(self.map.as_fd(), keys.len().min(BATCH))?;
            attr.keys = keys.as_ptr().expose_provenance() as u64;
            // SAFETY: the kernel reads `count` keys.
            let result = unsafe { bpf(bpf_cmd::BPF_MAP_DELETE_BATCH, &mut attr) };
            let done = match result {
                Ok(_) => attr.count as usize,
                // The batch ends at the first absent key, after `count` present ones.
                Err(error) if is_absent(&error) => attr.count as usize + 1,
                Err(error) if no_batches(&error) => {
                    return keys.iter().try_for_each(|key| self.delete(key));
                }
                Err(error) => return Err(error),
            };
            keys = keys.get(done.max(1)..).unwrap_or_default();
        }
        Ok(())
    }

    /// Enters an entry where there is none; false where there is one.
    pub fn insert_new(&self, key: &K, value: &V) -> io::Result<bool> {
        let mut attr = Element::new(self.map.as_fd(), Some(key));
        attr.value_or_next_key = std::ptr::from_ref(value).expose_provenance() as u64;
        attr.flags = u64::from(BPF_NOEXIST);
        // SAFETY: the kernel reads a key and a value; `new` has compared their sizes.
        match unsafe { bpf(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attr) } {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Deletes one entry and returns what it was at that moment; `None` where there is none. In
    /// kernels that cannot do both at once (before 5.14) it is read just before.
    pub fn take(&self, key: &K) -> io::Result<Option<V>> {
        let mut value = zeroed::<V>();
        let mut attr = Element::new(self.map.as_fd(), Some(key));
        attr.value_or_next_key = (&raw mut value).expose_provenance() as u64;
        // SAFETY: the kernel reads a key and writes a value; `new` has compared their sizes.
        match unsafe { bpf(bpf_cmd::BPF_MAP_LOOKUP_AND_DELETE_ELEM, &mut attr) } {
            Err(error) if no_batches(&error) => {
                let value = self.get(key)?;
                self.delete(key)?;
                Ok(value)
            }
            result => Ok(absent_is_none(result)?.map(|_| value)),
        }
    }

    /// Shows every entry of a hash, in batches where the kernel has them. Entries that come and go
    /// meanwhile may be missed, and in a kernel without batches be shown twice.
    pub fn visit(&self, visit: &mut dyn FnMut(&K, &V)) -> io::Result<()> {
        let mut walk = Walk::new();
        loop {
            let first = walk.at_start();
            match walk.step(self, BATCH) {
                Ok(entries) => entries.for_each(|(key, value)| visit(key, value)),
                Err(error) if first && no_batches(&error) => return self.visit_singly(visit),
                Err(error) => return Err(error),
            }
            if walk.at_start() {
                return Ok(());
            }
        }
    }

    /// Shows every entry, one call for each: of tries, whose batches need another kind of position.
    /// Entries that come and go meanwhile may be missed or be shown twice.
    pub fn visit_singly(&self, visit: &mut dyn FnMut(&K, &V)) -> io::Result<()> {
        let mut key = self.next_key(None)?;
        while let Some(current) = key {
            if let Some(value) = self.get(&current)? {
                visit(&current, &value);
            }
            key = self.next_key(Some(&current))?;
        }
        Ok(())
    }
}

/// A walk over all entries of a hash, some at a time. An entry that stays in the map is met once.
#[derive(Debug)]
pub struct Walk<K, V> {
    /// The kernel's position: a bucket number. None: at the start.
    position: Option<u32>,
    keys: Vec<K>,
    values: Vec<V>,
}

impl<K: Pod, V: Pod> Walk<K, V> {
    /// At the start.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            position: None,
            keys: Vec::new(),
            values: Vec::new(),
        }
    }

    /// Whether the next step begins anew: nothing was read yet, or all of it.
    #[must_use]
    pub const fn at_start(&self) -> bool {
        self.position.is_none()
    }

    /// Reads the next entries, `count` at most unless one bucket has more.
    ///
    /// # Errors
    /// `EINVAL` or `ENOTSUPP` from a kernel without batches (before 5.6), or for another kind of map.
    pub fn step(
        &mut self,
        map: &TypedMap<K, V>,
        count: usize,
    ) -> io::Result<impl Iterator<Item = (&K, &V)>> {
        let mut count = count.clamp(1, BATCH);
        let mut next = 0u32;
        let (read, last) = loop {
            let room = self.keys.len().max(count);
            self.keys.resize(room, zeroed());
            self.values.resize(room, zeroed());
            let mut attr = BatchCall::new(map.map.as_fd(), count)?;
            if let Some(position) = &self.position {
                attr.in_batch = std::ptr::from_ref(position).expose_provenance() as u64;
            }
            attr.out_batch = (&raw mut next).expose_provenance() as u64;
            attr.keys = self.keys.as_mut_ptr().expose_provenance() as u64;
            attr.values = self.values.as_mut_ptr().expose_provenance() as u64;
            // SAFETY: the kernel reads a position, writes one, and writes at most `count` keys and
            // values.
            match unsafe { bpf(bpf_cmd::BPF_MAP_LOOKUP_BATCH, &mut attr) } {
                Ok(_) => break (attr.count as usize, false),
                // The end, possibly with some entries.
                Err(error) if is_absent(&error) => break (attr.count as usize, true),
                // A bucket with more entries than fit.
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => count *= 2,
                Err(error) => return Err(error),
            }
        };
        self.position = (!last).then_some(next);
        Ok(self.keys.iter().zip(&self.values).take(read))
    }
}

impl<K: Pod, V: Pod> Default for Walk<K, V> {
    fn default() -> Self {
        Self::new()
    }
}

fn is_absent(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENOENT)
}

fn absent_is_none(result: io::Result<i32>) -> io::Result<Option<i32>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if is_absent(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether the kernel reads hashes in batches (5.6), tried on an empty one.
pub fn has_batches() -> io::Result<bool> {
    let hash = map_create(MapInfo {
        kind: bpf_map_type::BPF_MAP_TYPE_HASH as u32,
        key_size: 4,
        value_size: 4,
        max_entries: 1,
        flags: 0,
    })?;
    let (mut key, mut value, mut next) = (0u32, 0u32, 0u32);
    let mut attr = BatchCall::new(hash.as_fd(), 1)?;
    attr.out_batch = (&raw mut next).expose_provenance() as u64;
    attr.keys = (&raw mut key).expose_provenance() as u64;
    attr.values = (&raw mut value).expose_provenance() as u64;
    // SAFETY: the kernel writes at most one position, one key and one value, each of 4 bytes.
    match unsafe { bpf(bpf_cmd::BPF_MAP_LOOKUP_BATCH, &mut attr) } {
        Ok(_) => Ok(true),
        Err(error) if is_absent(&error) => Ok(true),
        Err(error) if no_batches(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether the kernel, or this kind of map, has no batch calls (before 5.6).
fn no_batches(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | ENOTSUPP))
}

/// Reads one element of a per-CPU array of u64: one word per possible CPU.
///
/// # Errors
/// `InvalidInput` if the map is of another kind.
pub fn per_cpu(map: BorrowedFd<'_>, index: u32) -> io::Result<Vec<u64>> {
    let info = map_info(map)?;
    let per_cpu = bpf_map_type::BPF_MAP_TYPE_PERCPU_ARRAY as u32;
    if info.kind != per_cpu || info.value_size as usize != size_of::<u64>() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a per-CPU array of u64",
        ));
    }
    let cpus = aya::util::nr_cpus().map_err(|(_, error)| error)?;
    let mut values = vec![0u64; cpus];
    let mut attr = Element::new(map, Some(&index));
    attr.value_or_next_key = values.as_mut_ptr().expose_provenance() as u64;
    // SAFETY: the kernel reads a key and writes one word per possible CPU.
    unsafe { bpf(bpf_cmd::BPF_MAP_LOOKUP_ELEM, &mut attr) }?;
    Ok(values)
}

fn zeroed<T: Pod>() -> T {
    // SAFETY: plain old data, for which zero is a value.
    unsafe { std::mem::zeroed() }
}

/// An array map's elements in this process's memory, as u64 words.
#[derive(Debug)]
pub struct MappedArray {
    words: NonNull<AtomicU64>,
    length: usize,
    bytes: usize,
}

// SAFETY: the memory is the kernel's until `drop`, wherever the struct is; it is only accessed
// through atomics.
unsafe impl Send for MappedArray {}
// SAFETY: as above.
unsafe impl Sync for MappedArray {}

impl MappedArray {
    /// Maps the elements of an array that was made with BPF_F_MMAPABLE.
    pub fn new(map: BorrowedFd<'_>) -> io::Result<Self> {
        let info = map_info(map)?;
        let stride = (info.value_size as usize).next_multiple_of(8);
        let bytes = stride * info.max_entries as usize;
        // SAFETY: a new mapping, of nothing but the map; the kernel refuses a length beyond its
        // elements' pages.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                map.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let words = NonNull::new(base.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Self {
            words,
            length: bytes / 8,
            bytes,
        })
    }

    /// All elements' words, one after the other.
    #[must_use]
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: mapped, page-aligned, `length` words long, and accessed through atomics only.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr(), self.length) }
    }
}

impl Drop for MappedArray {
    fn drop(&mut self) {
        // SAFETY: the mapping that `new` made; nothing borrows it any more.
        let result = unsafe { libc::munmap(self.words.as_ptr().cast(), self.bytes) };
        debug_assert_eq!(result, 0, "munmap");
    }
}

/// A record of whole u64 words, as it lies in memory.
#[must_use]
pub fn to_words<T: Pod>(record: &T) -> Vec<u64> {
    // SAFETY: plain old data without padding: `size_of::<T>()` readable bytes.
    let bytes = unsafe {
        std::slice::from_raw_parts(std::ptr::from_ref(record).cast::<u8>(), size_of::<T>())
    };
    let (words, rest) = bytes.as_chunks::<8>();
    debug_assert!(rest.is_empty(), "records in arrays are whole words");
    words.iter().copied().map(u64::from_ne_bytes).collect()
}

/// The record that lies in these words; `None` if there are not exactly enough.
#[must_use]
pub fn from_words<T: Pod>(words: &[u64]) -> Option<T> {
    if size_of_val(words) != size_of::<T>() {
        return None;
    }
    // SAFETY: as many bytes as `T` has, and every bit pattern is a value.
    Some(unsafe { std::ptr::read_unaligned(words.as_ptr().cast()) })
}

/// Returns when every program that ran at the time of the call has ended.
///
/// `MEMBARRIER_CMD_GLOBAL` is the kernel's `synchronize_rcu`, but does nothing where one CPU is
/// online: a program that was preempted there, or a kernel without the call, is waited for by the
/// clock.
pub fn grace() {
    // SAFETY: no pointers.
    let cpus = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) };
    // SAFETY: no pointers.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, libc::MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result != 0 || cpus < 2 {
        std::thread::sleep(Duration::from_secs(1));
    }
}
