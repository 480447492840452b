//! The configuration file: what neither a flag nor the environment says is taken from there.
//!
//! There is one list of settings, the options of `svc-lb run`. A file's values are put into the command line and parsed
//! with it, so that they have the same types, limits and messages.

mod file;
mod kube_proxy;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use clap::parser::ValueSource;
use clap::{ArgMatches, Command, CommandFactory as _, FromArgMatches as _, Subcommand};

use self::file::{Entry, File};
use super::run::Args as RunArgs;
use super::{Cli, Global, complain, output};
use crate::source::located::closest;

/// Where the file is looked for.
pub(super) const DEFAULT: &str = "/etc/svc-lb/config.yaml";

/// Check or show what `svc-lb run` would be told.
///
/// Settings come from the options of this command, which are those of `svc-lb run`, else from the environment, else from
/// the file, else they have their defaults.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Exit codes:
  0  it can be used
  1  it cannot, the message says why
  2  an option is wrong

Examples:
  svc-lb config check --config ./config.yaml
  svc-lb config check --config /var/lib/kube-proxy/config.conf   a KubeProxyConfiguration: what has no counterpart is named
  SVC_LB_XDP=off svc-lb config show                              each setting, and who says so")]
pub(super) struct Args {
    #[command(subcommand)]
    command: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Say whether `svc-lb run` could use it.
    Check(Box<RunArgs>),
    /// Print each setting and where it comes from.
    Show(Box<RunArgs>),
}

/// Runs the command.
pub(super) fn run(args: &Args, global: &Global, settings: &Effective) -> Result<ExitCode> {
    let (Action::Check(run) | Action::Show(run)) = &args.command;
    let show = matches!(args.command, Action::Show(_));
    let result = super::run::check(run, global);
    for ignored in &settings.ignored {
        complain(ignored);
    }
    if show {
        output::print(&settings.to_string())?;
    }
    result?;
    if !show {
        let from = match &settings.path {
            Some(path) => format!("{}: ", path.display()),
            None => "no file: ".to_owned(),
        };
        output::print(&format!("{from}can be used\n"))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// One setting as it is.
#[derive(Clone, Debug)]
pub(super) struct Setting {
    values: Vec<String>,
    from: &'static str,
}

/// All settings, and who said so.
#[derive(Clone, Debug, Default)]
pub(super) struct Effective {
    path: Option<PathBuf>,
    settings: BTreeMap<String, Setting>,
    /// What a kube-proxy configuration says that has no counterpart.
    pub(super) ignored: Vec<String>,
}

impl std::fmt::Display for Effective {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (key, Setting { values, from }) in &self.settings {
            let text = match &**values {
                [] => "null".to_owned(),
                [one] => quoted(one),
                many => format!(
                    "[{}]",
                    many.iter()
                        .map(|v| quoted(v))
                        .collect::<Vec<_>>()
                        .join(", ")
                ),
            };
            writeln!(f, "{:<44} # {from}", format!("{key}: {text}"))?;
        }
        Ok(())
    }
}

/// A YAML scalar that is read as it was written.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "./_-".contains(c);
    if !text.is_empty() && text.chars().all(plain) && !text.starts_with('-') {
        return text.to_owned();
    }
    serde_json::Value::from(text).to_string()
}

impl Effective {
    /// As JSON, for `/configz`.
    pub(super) fn json(&self) -> serde_json::Value {
        let settings = self.settings.iter();
        settings
            .map(|(key, setting)| match &*setting.values {
                [] => (key.clone(), serde_json::Value::Null),
                [one] => (key.clone(), one.clone().into()),
                many => (key.clone(), many.to_vec().into()),
            })
            .collect()
    }
}

/// Parses the command line, with what the file says where neither it nor the environment does.
///
/// # Errors
/// When the file cannot be used. A wrong command line ends the process, as clap does it.
pub(super) fn parse(args: impl IntoIterator<Item = OsString>) -> Result<(Cli, Effective)> {
    let args: Vec<OsString> = args.into_iter().collect();
    let command = Cli::command();
    let matches = command
        .clone()
        .try_get_matches_from(&args)
        .unwrap_or_else(|error| error.exit());
    let said = deepest(&matches);
    let path = match said.get_one::<PathBuf>("config") {
        Some(path) => Some(path.clone()),
        None => Some(PathBuf::from(DEFAULT)).filter(|path| path.exists()),
    };
    let Some(path) = path else {
        let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
        return Ok((cli, effective(&command, said, &[], None, Vec::new())));
    };
    let File { entries, ignored } = File::read(&path)?;
    let known = known(&command);
    let used = applicable(&path, &command, said, &known, entries)?;
    let file_args = used.iter().flat_map(|entry| to_args(&command, entry));
    let all = args.iter().cloned().chain(file_args.map(OsString::from));
    let matches = match command.clone().try_get_matches_from(all) {
        Ok(matches) => matches,
        Err(error) => bail!("{}: {}", path.display(), reworded(&error.to_string())),
    };
    let cli = Cli::from_arg_matches(&matches)
        .with_context(|| format!("{} cannot be used", path.display()))?;
    let keys: Vec<&str> = used.iter().map(|entry| entry.key.as_str()).collect();
    let effective = effective(&command, deepest(&matches), &keys, Some(&path), ignored);
    Ok((cli, effective))
}

/// clap's message, without what is about the command line only.
fn reworded(message: &str) -> &str {
    let message = message.trim_start_matches("error: ");
    message
        .split("\n\nUsage")
        .next()
        .unwrap_or(message)
        .trim_end()
}

/// The matches of the innermost subcommand: global options are there, too.
fn deepest(matches: &ArgMatches) -> &ArgMatches {
    let mut at = matches;
    while let Some((_, inner)) = at.subcommand() {
        at = inner;
    }
    at
}

/// Options of `svc-lb run`, those of every command among them.
fn options(command: &Command) -> impl Iterator<Item = &clap::Arg> {
    let run = command.find_subcommand("run").into_iter();
    let own = run.flat_map(Command::get_arguments);
    let of_file = |arg: &&clap::Arg| {
        arg.get_long()
            .is_some_and(|long| !matches!(long, "config" | "help" | "version"))
    };
    own.chain(command.get_arguments()).filter(of_file)
}

/// Keys of a file.
fn known(command: &Command) -> Vec<&str> {
    options(command).filter_map(clap::Arg::get_long).collect()
}

fn option<'a>(command: &'a Command, key: &str) -> Option<&'a clap::Arg> {
    options(command).find(|arg| arg.get_long() == Some(key))
}

/// What of a file counts for this command: nothing that was said more strongly, and of other commands than `run` only
/// what every command has.
fn applicable(
    path: &Path,
    command: &Command,
    said: &ArgMatches,
    known: &[&str],
    entries: Vec<Entry>,
) -> Result<Vec<Entry>> {
    let mut used = Vec::new();
    for entry in entries {
        let place = format!("{}:{}", path.display(), entry.line);
        let Some(option) = option(command, &entry.key) else {
            let meant = closest(&entry.key, known);
            let meant = meant.map(|meant| format!("; did you mean {meant}?"));
            bail!(
                "{place}: unknown setting {:?}{}",
                entry.key,
                meant.unwrap_or_default()
            );
        };
        let id = option.get_id().as_str();
        // Not all commands have all options.
        let Ok(_) = said.try_contains_id(id) else {
            continue;
        };
        let stronger = matches!(
            said.value_source(id),
            Some(ValueSource::CommandLine | ValueSource::EnvVariable)
        );
        if !stronger {
            used.push(entry);
        }
    }
    Ok(used)
}

fn to_args(command: &Command, Entry { key, values, .. }: &Entry) -> Vec<String> {
    let takes_value = option(command, key).is_some_and(|arg| arg.get_action().takes_values());
    if !takes_value {
        let on = values.iter().any(|value| value == "true");
        return on.then(|| format!("--{key}")).into_iter().collect();
    }
    values
        .iter()
        .map(|value| format!("--{key}={value}"))
        .collect()
}

fn effective(
    command: &Command,
    matches: &ArgMatches,
    of_file: &[&str],
    path: Option<&Path>,
    ignored: Vec<String>,
) -> Effective {
    let mut settings = BTreeMap::new();
    for option in options(command) {
        let (id, Some(key)) = (option.get_id().as_str(), option.get_long()) else {
            continue;
        };
        if matches.try_contains_id(id).is_err() {
            continue;
        }
        let from = match matches.value_source(id) {
            _ if of_file.contains(&key) => "file",
            Some(ValueSource::CommandLine) => "flag",
            Some(ValueSource::EnvVariable) => "environment",
            _ => "default",
        };
        let secret = option.is_hide_env_values_set();
        let raw = matches.get_raw(id).into_iter().flatten();
        let values = raw.map(|value| match (secret, value.to_string_lossy()) {
            (true, text) if !text.is_empty() => "(secret)".to_owned(),
            (_, text) => text.into_owned(),
        });
        let values = values.collect();
        settings.insert(key.to_owned(), Setting { values, from });
    }
    Effective {
        path: path.map(Path::to_owned),
        settings,
        ignored,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn with_file(text: &str, line: &str) -> Result<(Cli, Effective)> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.yaml");
        fs::write(&path, text).unwrap();
        let line = format!("{line} --config {}", path.display());
        parse(line.split_whitespace().map(OsString::from))
    }

    fn shown(text: &str, line: &str) -> Vec<String> {
        let (_, effective) = with_file(text, line).unwrap();
        let text = effective.to_string();
        let lines = text.lines().filter(|line| !line.ends_with("# default"));
        lines
            .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect()
    }

    #[test]
    fn flags_are_stronger_than_the_file() {
        let file = "manifests: [a, b]\nxdp: off\nmasquerade-all: true\ndatapath-log: false\nsnat-ports: 61000-62000\n";
        assert_eq!(
            shown(file, "svc-lb run --xdp native"),
            [
                "datapath-log: false # file",
                "manifests: [a, b] # file",
                "masquerade-all: true # file",
                "snat-ports: 61000-62000 # file",
                "xdp: native # flag",
            ]
        );
        // Other commands take what they have.
        let admin = "admin-socket: /run/other.sock\nxdp: off\n";
        let (cli, _) = with_file(admin, "svc-lb status").unwrap();
        assert_eq!(cli.global.admin_socket, PathBuf::from("/run/other.sock"));
    }

    #[test]
    fn mistakes_are_named() {
        let error = |text: &str| {
            let error = with_file(text, "svc-lb run").unwrap_err();
            let text = format!("{error:#}");
            text.split_once("config.yaml")
                .map(|(_, rest)| rest.to_owned())
                .unwrap_or(text)
        };
        assert_eq!(
            error("uplnik: eth0\n"),
            ":1: unknown setting \"uplnik\"; did you mean uplink?"
        );
        assert_eq!(
            error("manifests: a\nservice_cidr: 10.0.0.0/16\n"),
            ":2: unknown setting \"service_cidr\"; did you mean service-cidr?"
        );
        assert!(
            error("snat-ports: 7\n").contains("write FIRST-LAST"),
            "{}",
            error("snat-ports: 7\n")
        );
        assert!(error("xdp: {a: b}\n").contains(":1: xdp: a value or a list of values"));
        assert!(error("- a\n").contains(": settings and their values"));
        assert!(error("source: kubernetes\nstream: \"-\"\n").contains("cannot be used with"));
    }

    #[test]
    fn kube_proxy_configurations_are_read() {
        let text = "\
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
bindAddress: 0.0.0.0
clientConnection: {kubeconfig: /var/lib/kube-proxy/kubeconfig.conf, qps: 0}
clusterCIDR: 10.244.0.0/16
conntrack: {maxPerCore: 32768, tcpEstablishedTimeout: 2h0m0s, udpTimeout: 0s}
healthzBindAddress: 192.0.2.1
hostnameOverride: node-7
iptables: {masqueradeAll: true, syncPeriod: 0s, localhostNodePorts: true}
mode: nftables
nodePortAddresses: [primary]
strange: 1
";
        assert_eq!(
            shown(text, "svc-lb run"),
            [
                "healthz-bind-address: \"192.0.2.1:10256\" # file",
                "kubeconfig: /var/lib/kube-proxy/kubeconfig.conf # file",
                "masquerade-all: true # file",
                "node-name: node-7 # file",
                "nodeport-addresses: primary # file",
                "timeout: \"tcp-established=2h0m0s\" # file",
            ]
        );
        let (_, effective) = with_file(text, "svc-lb run").unwrap();
        let named: Vec<&str> = effective
            .ignored
            .iter()
            .filter_map(|line| line.split(": ").nth(1))
            .collect();
        assert_eq!(
            named,
            [
                "bindAddress",
                "clusterCIDR",
                "conntrack.maxPerCore",
                "iptables.localhostNodePorts",
                "mode",
                "strange"
            ]
        );
    }
}
