//! The programs against the reference: the same tables, the same packets, the same answers.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use fastrand::Rng;
use svc_lb::dataplane::Dataplane as _;
use svc_lb::model::ObjectName;
use svc_lb::plan;
use svc_lb_common::outcome::{Hook, Outcome};

use super::frame::Frame;
use super::network::{BRIDGE_SOURCES, Network, STRANGER, UPLINK, XDP_UPLINK};
use super::random::{self, Packet, SERVICES, Traffic};
use super::reference::{Answer, Reference};
use super::rig::{Count, Counters, Rig, Setup, edges, links};

/// Packets between comparisons of the counters, unless every packet's are wanted.
const BATCH: usize = 64;
/// Packets that a mismatch shows.
const SHOWN: usize = 6;

/// What to compare.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Where all that is random begins.
    pub seed: u64,
    /// Loads of the programs, each with settings, services and flows of its own.
    pub rounds: u32,
    /// Packets of each round.
    pub packets: usize,
    /// Counters are compared after every packet, so that a wrong one is seen where it happens.
    pub count_each: bool,
}

/// What was compared.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Packets that went through both.
    pub packets: usize,
    /// ICMP messages about flows among them.
    pub messages: u64,
    /// Fragments among them.
    pub fragments: u64,
    /// Fragmented datagrams whose parts all went the same way: put together, they had the right checksum.
    pub datagrams: usize,
    /// How often each outcome and event was counted; "not ours" too, which the programs do not count.
    pub coverage: Counters,
    /// Time in the programs, in the reference, and in all.
    pub times: [Duration; 3],
}

/// Where the programs and the reference differ.
#[derive(Clone, Debug)]
pub struct Mismatch(pub String);

/// One round's state.
struct Round {
    rig: Rig,
    reference: Reference,
    traffic: Traffic,
    rng: Rng,
    expected: Counters,
    latest: VecDeque<(Packet, Answer)>,
    /// What came out of the latest datagrams' parts.
    parts: BTreeMap<u64, Vec<Vec<u8>>>,
}

/// Sends random packets through the programs in `object` and through the reference until they differ.
///
/// # Errors
/// The first difference.
pub fn run(network: &Network, object: &Path, plan: &Plan) -> Result<Report, Mismatch> {
    let mut report = Report::default();
    for number in 0..plan.rounds {
        let seed = plan.seed.wrapping_add(u64::from(number));
        let mut round = Round::new(network, object, seed);
        round
            .run(plan, &mut report)
            .map_err(|what| Mismatch(format!("seed {seed}: {what}")))?;
    }
    Ok(report)
}

impl Round {
    fn new(network: &Network, object: &Path, seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let setup = Setup {
            object: object.to_owned(),
            ..random::setup(&mut rng)
        };
        let rig = Rig::with(network, &setup);
        let reference = Reference::new(rig.config, edges(network), links(network));
        let mut round = Self {
            rig,
            reference,
            traffic: Traffic::new(*network),
            rng,
            expected: Counters::default(),
            latest: VecDeque::new(),
            parts: BTreeMap::new(),
        };
        round
            .rig
            .planner
            .set_node_addresses(random::node_addresses());
        let outs = [UPLINK, XDP_UPLINK, STRANGER].map(|out| out.sources);
        let sources = outs.into_iter().flatten().chain(BRIDGE_SOURCES);
        round.rig.planner.set_sources(sources);
        for number in 0..SERVICES {
            round.describe(number);
        }
        round.program();
        round.lose_pods();
        round
    }

    fn run(&mut self, plan: &Plan, report: &mut Report) -> Result<(), String> {
        let started = Instant::now();
        for number in 0..plan.packets {
            self.disturb();
            self.packet(report)
                .map_err(|what| format!("packet {number}: {what}{}", self.history()))?;
            if plan.count_each || number % BATCH == 0 || number + 1 == plan.packets {
                self.compare_counters()
                    .map_err(|what| format!("packet {number}: {what}{}", self.history()))?;
            }
        }
        self.rig.check_tallies()?;
        report.packets += plan.packets;
        report.messages += self.traffic.messages;
        report.fragments += self.traffic.fragments;
        report.times[2] += started.elapsed();
        for (count, number) in self.expected.iter() {
            report.coverage.add(count, number);
        }
        Ok(())
    }

    /// Now and then changes what packets meet.
    fn disturb(&mut self) {
        match self.rng.u32(..6_000) {
            0..90 => {
                for _ in 0..self.rng.usize(1..3) {
                    let number = self.rng.usize(..SERVICES);
                    self.describe(number);
                }
                self.program();
            }
            90..120 => {
                let tokens = self.rng.choice([0, 1, 5, 80]).expect("a number");
                if self.rig.set_tokens(tokens) {
                    self.reference.tokens = tokens;
                }
            }
            120..123 => {
                let long_ago = u64::from(self.rig.config.hz) * 1_000_000;
                self.rig
                    .change_pins(|pin| pin.seen = pin.seen.wrapping_sub(long_ago));
                self.reference.age_pins();
            }
            123..126 => self.break_a_service(),
            126..129 => {
                self.rig.clear_flows();
                self.reference.clear_flows();
            }
            129..132 => {
                plan::reclaim(&mut self.rig.planner, &self.rig.kernel).expect("a grace period");
            }
            132..150 => {
                self.rig.age_datagrams();
                self.reference.age_datagrams();
            }
            150..156 => {
                self.rig.age_fragments(0);
                self.reference.age_fragments();
            }
            156..250 => {
                if let Some([lost, kept]) = self.reference.evict(self.rng.u64(..)) {
                    self.rig.evict(&lost, &kept);
                }
            }
            250..280 => self.lose_pods(),
            _ => {}
        }
    }

    /// Says of most pods that they have vanished.
    fn lose_pods(&mut self) {
        let pods = random::pods(&mut self.rng);
        self.rig.set_vanished(&pods);
        self.reference.vanished = pods;
    }

    /// Describes a service anew; to be programmed.
    fn describe(&mut self, number: usize) {
        let ports = random::service(&mut self.rng, number).into_iter().collect();
        self.rig
            .planner
            .set_service(&ObjectName::new("test", format!("s{number}")), ports);
    }

    fn program(&mut self) {
        self.rig.apply();
        self.tell_reference();
    }

    fn tell_reference(&mut self) {
        let snapshot = self.rig.kernel.snapshot().expect("the maps are read");
        self.reference.set_tables(&snapshot);
    }

    /// Empties the slots of a service, as no agent does.
    fn break_a_service(&mut self) {
        let snapshot = self.rig.kernel.snapshot().expect("the maps are read");
        let ranges: Vec<_> = snapshot
            .services
            .iter()
            .flat_map(|(_, service)| [service.cluster, service.local])
            .filter(|range| range.length() > 0)
            .collect();
        let Some(range) = self.rng.choice(ranges) else {
            return;
        };
        let nothing = vec![0; range.length() as usize];
        self.rig
            .kernel
            .put_slots(range.start(), &nothing)
            .expect("slots are written");
        self.tell_reference();
    }

    fn packet(&mut self, report: &mut Report) -> Result<(), String> {
        let packet = self.traffic.next(&mut self.rng);
        let Packet {
            hook,
            interface,
            ref bytes,
            ..
        } = packet;
        let begin = Instant::now();
        let answer = self.reference.handle(hook, interface, bytes);
        let between = Instant::now();
        let (verdict, out) = self.rig.run(hook, interface, bytes);
        report.times[0] += between.elapsed();
        report.times[1] += between - begin;

        self.count(hook, &answer, report);
        self.traffic.came_of(
            &mut self.rng,
            &packet,
            answer.verdict,
            answer.bytes.as_deref(),
        );
        // What its sender is told in its place is no part of the datagram; what is left alone is not ours to keep right.
        let told = [
            Outcome::Rejected,
            Outcome::TooBig,
            Outcome::TimeExceeded,
            Outcome::Reset,
        ]
        .contains(&answer.outcome);
        let changed = answer
            .bytes
            .as_ref()
            .filter(|bytes| **bytes != packet.bytes && !told);
        if let (Some((number, of)), Some(bytes)) = (packet.piece, changed) {
            self.part(number, of, bytes, report)?;
        }
        let bytes_differ = answer.bytes.as_ref().is_some_and(|bytes| *bytes != out);
        self.latest.push_back((packet, answer.clone()));
        if self.latest.len() > SHOWN {
            self.latest.pop_front();
        }
        if verdict != answer.verdict {
            return Err(format!(
                "{verdict:?}, the reference says {:?}",
                answer.verdict
            ));
        }
        if bytes_differ {
            return Err(format!("came out as {}", hex(&out)));
        }
        Ok(())
    }

    /// Puts a datagram together when its last part has come out, if all have the same addresses.
    fn part(
        &mut self,
        number: u64,
        of: usize,
        bytes: &[u8],
        report: &mut Report,
    ) -> Result<(), String> {
        let parts = self.parts.entry(number).or_default();
        parts.push(bytes.to_vec());
        if parts.len() < of {
            return Ok(());
        }
        let parts = self.parts.remove(&number).unwrap_or_default();
        self.parts.retain(|other, _| other + 100 > number);
        if Frame::went_together(&parts) {
            let whole = Frame::put_together(&parts);
            whole.ok_or_else(|| format!("datagram {number} is not what it was: {parts:02x?}"))?;
            report.datagrams += 1;
        }
        Ok(())
    }

    fn count(&mut self, hook: Hook, answer: &Answer, report: &mut Report) {
        let outcome = Count::Outcome(hook, answer.outcome);
        if answer.outcome == Outcome::NotOurs {
            report.coverage.add(outcome, 1);
        } else {
            self.expected.add(outcome, 1);
        }
        for event in &answer.events {
            self.expected.add(Count::Event(*event), 1);
        }
    }

    fn compare_counters(&self) -> Result<(), String> {
        let counted = self.rig.counters();
        if counted == self.expected {
            return Ok(());
        }
        let all: std::collections::BTreeSet<Count> = counted
            .iter()
            .chain(self.expected.iter())
            .map(|(count, _)| count)
            .collect();
        let mut what = String::from("counters differ (set SVC_LB_SEED to see the packet)");
        for count in all {
            let (programs, reference) = (counted.get(count), self.expected.get(count));
            if programs != reference {
                let _ = write!(
                    what,
                    "\n  {count:?}: {programs}, the reference says {reference}"
                );
            }
        }
        Err(what)
    }

    /// The latest packets, the one at fault last.
    fn history(&self) -> String {
        let mut text = String::new();
        for (packet, answer) in &self.latest {
            let _ = write!(
                text,
                "\n{} at {}: {}\n  {}\n  the reference: {:?} {:?} {:?} {}",
                packet.hook.name(),
                packet.interface,
                Frame::parse(&packet.bytes).map_or_else(String::new, |frame| format!(
                    "{} -> {} {:?}",
                    frame.source, frame.destination, frame.transport
                )),
                hex(&packet.bytes),
                answer.verdict,
                answer.outcome,
                answer.events,
                answer.bytes.as_deref().map_or_else(String::new, hex),
            );
        }
        text
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
