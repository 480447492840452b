//! The gate a BPF object passes before it is embedded.
//!
//! A panic path that survives optimisation makes a program unloadable, and the verifier's message does not say
//! so ("last insn is not an exit or jmp"). These checks find it, and other late surprises, at build time and
//! name the symbol.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, bail};
use object::{
    Object as _, ObjectSection as _, ObjectSymbol as _, RelocationTarget, SectionIndex,
    SectionKind, SymbolIndex, SymbolKind,
};
use rustc_demangle::demangle;

/// The kernel cuts longer names, and two cut names may be the same.
const MAP_NAME_MAX: usize = 15;
/// Bytes of one instruction.
const INSN_SIZE: u8 = 8;
/// What to look for in the named callers.
const PANIC_CAUSES: &str = "look for unchecked indexing or slicing, division by a run-time value, \
                            unwrap/expect or copy_from_slice";

/// Checks the object; the error lists every finding.
pub(crate) fn check(bytes: &[u8]) -> Result<()> {
    let file = object::File::parse(bytes).context("not an ELF object")?;
    let findings = findings(&file);
    if findings.is_empty() {
        return Ok(());
    }
    bail!(
        "the BPF object would not load or not work:\n  - {}",
        findings.join("\n  - ")
    )
}

fn findings(file: &object::File<'_>) -> Vec<String> {
    let calls = calls(file);
    let mut found = Vec::new();
    for section in file.sections() {
        let name = section.name().unwrap_or_default();
        if name.starts_with(".text.unlikely") {
            found.push(format!(
                "section {name}: cold code survived; {PANIC_CAUSES}"
            ));
        }
    }
    for symbol in file.symbols() {
        let name = symbol.name().unwrap_or_default();
        if name.contains("panicking") {
            found.push(format!(
                "symbol {:#}{}: a panic path survived; {PANIC_CAUSES}",
                demangle(name),
                called_from(&calls, &symbol)
            ));
        } else if symbol.is_undefined() && !name.is_empty() {
            found.push(format!(
                "symbol {:#}{} is undefined: it is in neither core nor this crate (an extern kernel \
                 function, or an intrinsic that the BPF target lacks)",
                demangle(name),
                called_from(&calls, &symbol)
            ));
        }
        if in_map_section(file, symbol.section_index()) && name.len() > MAP_NAME_MAX {
            found.push(format!(
                "map {name}: {} characters, the kernel keeps {MAP_NAME_MAX}: shorten the name",
                name.len()
            ));
        }
    }
    if file.section_by_name("license").is_none() {
        found.push(
            "section license is missing: many helpers are for GPL-compatible programs only; put the \
             licence string into `#[unsafe(link_section = \"license\")]`"
                .to_owned(),
        );
    }
    found
}

/// One call instruction.
struct Call {
    caller: String,
    callee: Callee,
}

/// Where a call goes.
#[derive(PartialEq, Eq)]
enum Callee {
    /// A symbol that the linker left for the loader to resolve.
    Symbol(SymbolIndex),
    /// An address of a section.
    Code(SectionIndex, u64),
}

/// Every call from one function of the object to another.
fn calls(file: &object::File<'_>) -> Vec<Call> {
    let mut calls = Vec::new();
    for section in file.sections() {
        let Ok(code) = section.data() else { continue };
        if section.kind() != SectionKind::Text {
            continue;
        }
        let relocations: BTreeMap<u64, RelocationTarget> = section
            .relocations()
            .map(|(offset, relocation)| (offset, relocation.target()))
            .collect();
        for (offset, insn) in (0..)
            .step_by(usize::from(INSN_SIZE))
            .zip(code.chunks_exact(usize::from(INSN_SIZE)))
        {
            if let Some(relative) = function_call(file, insn) {
                let callee = match relocations.get(&offset) {
                    Some(RelocationTarget::Symbol(index)) => relocated(file, *index, relative),
                    Some(_) => None,
                    None => Some(Callee::Code(
                        section.index(),
                        offset.wrapping_add_signed(relative),
                    )),
                };
                calls.extend(callee.map(|callee| Call {
                    caller: function_at(file, section.index(), offset),
                    callee,
                }));
            }
        }
    }
    calls
}

/// The distance in bytes from a call of another function to the function, unless `insn` is something else.
fn function_call(file: &object::File<'_>, insn: &[u8]) -> Option<i64> {
    const BPF_CALL: u8 = 0x85;
    const BPF_PSEUDO_CALL: u8 = 1;
    let (&[op, registers, _, _], imm) = insn.split_first_chunk::<4>()?;
    let imm = <[u8; 4]>::try_from(imm).ok()?;
    let (source, imm) = if file.is_little_endian() {
        (registers >> 4, i32::from_le_bytes(imm))
    } else {
        (registers & 0xf, i32::from_be_bytes(imm))
    };
    // The distance counts instructions and starts behind the call.
    (op == BPF_CALL && source == BPF_PSEUDO_CALL)
        .then(|| (i64::from(imm) + 1) * i64::from(INSN_SIZE))
}

/// A relocation names the function itself, or its section, the distance then being the address in it.
fn relocated(file: &object::File<'_>, index: SymbolIndex, relative: i64) -> Option<Callee> {
    let symbol = file.symbol_by_index(index).ok()?;
    match symbol.section_index() {
        Some(section) if symbol.kind() == SymbolKind::Section => {
            Some(Callee::Code(section, u64::try_from(relative).ok()?))
        }
        Some(section) => Some(Callee::Code(section, symbol.address())),
        None => Some(Callee::Symbol(index)),
    }
}

/// " (called from a, b)", or nothing where no call is found.
fn called_from(calls: &[Call], symbol: &object::Symbol<'_, '_>) -> String {
    let here = match symbol.section_index() {
        Some(section) => Callee::Code(section, symbol.address()),
        None => Callee::Symbol(symbol.index()),
    };
    let callers: BTreeSet<_> = calls
        .iter()
        .filter(|call| call.callee == here)
        .map(|call| call.caller.as_str())
        .collect();
    if callers.is_empty() {
        return String::new();
    }
    let callers: Vec<_> = callers.into_iter().collect();
    format!(" (called from {})", callers.join(", "))
}

/// The name of the function whose code covers `offset` of `section`.
fn function_at(file: &object::File<'_>, section: SectionIndex, offset: u64) -> String {
    file.symbols()
        .filter(|symbol| {
            symbol.kind() == SymbolKind::Text
                && symbol.section_index() == Some(section)
                && (symbol.address()..symbol.address() + symbol.size()).contains(&offset)
        })
        .find_map(|symbol| {
            symbol
                .name()
                .ok()
                .map(|name| format!("{:#}", demangle(name)))
        })
        .unwrap_or_else(|| "unnamed code".to_owned())
}

fn in_map_section(file: &object::File<'_>, section: Option<SectionIndex>) -> bool {
    section
        .and_then(|index| file.section_by_index(index).ok())
        .is_some_and(|section| matches!(section.name(), Ok("maps" | ".maps")))
}

#[cfg(test)]
mod tests {
    use object::write::{Object, Relocation, StandardSection, Symbol, SymbolId, SymbolSection};
    use object::{
        Architecture, BinaryFormat, Endianness, RelocationFlags, SymbolFlags, SymbolScope, elf,
    };

    use super::*;

    const EXIT: [u8; 8] = [0x95, 0, 0, 0, 0, 0, 0, 0];
    /// A call of the function behind the next instruction.
    const CALL: [u8; 8] = [0x85, 0x10, 0, 0, 1, 0, 0, 0];

    /// An object with a licence and, in `.text`, the given function of two instructions.
    fn object_with(name: &str, code: [[u8; 8]; 2]) -> Object<'static> {
        let mut object = Object::new(BinaryFormat::Elf, Architecture::Bpf, Endianness::Little);
        let licence = object.add_section(vec![], b"license".to_vec(), SectionKind::Data);
        object.append_section_data(licence, b"GPL\0", 1);
        function(&mut object, name, code);
        object
    }

    fn function(object: &mut Object<'_>, name: &str, code: [[u8; 8]; 2]) -> SymbolId {
        let text = object.section_id(StandardSection::Text);
        let id = object.add_symbol(symbol(name, SymbolSection::Section(text)));
        object.add_symbol_data(id, text, code.as_flattened(), 8);
        id
    }

    fn symbol(name: &str, section: SymbolSection) -> Symbol {
        Symbol {
            name: name.as_bytes().to_vec(),
            value: 0,
            size: 0,
            kind: SymbolKind::Text,
            scope: SymbolScope::Linkage,
            weak: false,
            section,
            flags: SymbolFlags::None,
        }
    }

    fn complaint(object: &Object<'_>) -> String {
        check(&object.write().unwrap()).unwrap_err().to_string()
    }

    #[test]
    fn sound_objects_pass() {
        let mut object = object_with("tc_ingress", [EXIT, EXIT]);
        let maps = object.add_section(vec![], b"maps".to_vec(), SectionKind::Data);
        let map = object.add_symbol(symbol("fifteen_letters", SymbolSection::Section(maps)));
        object.add_symbol_data(map, maps, &[0; 4], 4);
        check(&object.write().unwrap()).unwrap();
    }

    #[test]
    fn a_panic_path_is_named_with_its_caller() {
        let mut object = object_with("tc_ingress", [CALL, EXIT]);
        function(
            &mut object,
            "_ZN4core9panicking5panic17h0123456789abcdefE",
            [EXIT, EXIT],
        );
        let complaint = complaint(&object);
        assert!(
            complaint.contains("core::panicking::panic (called from tc_ingress)"),
            "{complaint}"
        );
    }

    #[test]
    fn cold_code_is_found() {
        let mut object = object_with("tc_ingress", [EXIT, EXIT]);
        object.add_section(vec![], b".text.unlikely.".to_vec(), SectionKind::Text);
        assert!(complaint(&object).contains("section .text.unlikely."));
    }

    #[test]
    fn undefined_functions_are_named_with_their_caller() {
        let mut object = object_with("xdp_ingress", [CALL, EXIT]);
        let missing = object.add_symbol(symbol("bpf_skb_ct_lookup", SymbolSection::Undefined));
        let text = object.section_id(StandardSection::Text);
        let relocation = Relocation {
            offset: 0,
            symbol: missing,
            addend: 0,
            flags: RelocationFlags::Elf {
                r_type: elf::R_BPF_64_32,
            },
        };
        object.add_relocation(text, relocation).unwrap();
        // Adding the relocation writes its addend over the instruction.
        object.section_mut(text).data_mut()[..8].copy_from_slice(&CALL);
        let complaint = complaint(&object);
        assert!(
            complaint.contains("bpf_skb_ct_lookup (called from xdp_ingress) is undefined"),
            "{complaint}"
        );
    }

    #[test]
    fn long_map_names_are_found() {
        let mut object = object_with("tc_ingress", [EXIT, EXIT]);
        let maps = object.add_section(vec![], b".maps".to_vec(), SectionKind::Data);
        let map = object.add_symbol(symbol("sixteen_letters_", SymbolSection::Section(maps)));
        object.add_symbol_data(map, maps, &[0; 4], 4);
        assert!(complaint(&object).contains("map sixteen_letters_: 16 characters"));
    }

    #[test]
    fn a_missing_licence_is_found() {
        let mut object = Object::new(BinaryFormat::Elf, Architecture::Bpf, Endianness::Little);
        function(&mut object, "tc_ingress", [EXIT, EXIT]);
        assert!(complaint(&object).contains("section license is missing"));
    }
}
