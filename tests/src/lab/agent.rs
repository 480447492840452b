//! The agent under test, as the process a user would run.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::Signal;

use super::addresses::{Family, LB_POOL, SERVICES};
use super::netns::Namespace;
use super::patient;
use super::process::{Process, collected};
use super::receiver::Receiver;
use super::topology::{Lab, NodeName, POD_INTERFACES};

/// Environment variable that names the agent binary.
pub const BINARY: &str = "SVC_LB_BIN";

/// Limit for anything the agent is asked to do; see [`patient`].
const PATIENCE: Duration = Duration::from_secs(20);

/// How node-a's uplinks take packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// At tc alone.
    Tc,
    /// At XDP after the driver, then at tc.
    Generic,
    /// At XDP in the driver, then at tc.
    Native,
}

impl Mode {
    /// Each of them.
    pub const ALL: [Self; 3] = [Self::Tc, Self::Generic, Self::Native];

    /// The value of `--xdp`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tc => "off",
            Self::Generic => "generic",
            Self::Native => "native",
        }
    }
}

/// How to run the agent.
#[derive(Debug, Clone)]
pub struct AgentConfig {
    /// The option that names the source, and its value.
    source: (&'static str, PathBuf),
    xdp: Option<String>,
    sockets: String,
    any_cgroup: bool,
    extra: Vec<OsString>,
}

impl AgentConfig {
    /// With the Kubernetes objects in a file or directory.
    #[must_use]
    pub fn manifests(path: impl Into<PathBuf>) -> Self {
        Self::of("--manifests", path.into())
    }

    /// With the API server that a kubeconfig names.
    #[must_use]
    pub fn cluster(kubeconfig: impl Into<PathBuf>) -> Self {
        Self::of("--kubeconfig", kubeconfig.into())
    }

    fn of(option: &'static str, source: PathBuf) -> Self {
        Self {
            source: (option, source),
            xdp: None,
            sockets: "off".to_owned(),
            any_cgroup: false,
            extra: Vec::new(),
        }
    }

    /// With `--xdp MODE`.
    #[must_use]
    pub fn xdp(mut self, mode: &str) -> Self {
        self.xdp = Some(mode.to_owned());
        self
    }

    /// With `--socket-lb MODE`. Off if not said: most scenarios are about packets.
    #[must_use]
    pub fn sockets(mut self, mode: &str) -> Self {
        mode.clone_into(&mut self.sockets);
        self
    }

    /// Without `--cgroup`, as on a node of its own.
    #[must_use]
    pub fn any_cgroup(mut self) -> Self {
        self.any_cgroup = true;
        self
    }

    /// With further arguments of `svc-lb run`.
    #[must_use]
    pub fn args<A: Into<OsString>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.extra.extend(args.into_iter().map(Into::into));
        self
    }
}

/// The agent of node-a. Dropping it kills it and detaches everything.
#[derive(Debug)]
pub struct AgentProcess {
    node: Arc<Namespace>,
    uplinks: Vec<String>,
    config: AgentConfig,
    binary: PathBuf,
    pin_dir: PathBuf,
    admin_socket: PathBuf,
    state_dir: PathBuf,
    log: PathBuf,
    process: Option<Process>,
    /// What takes frames that native XDP sends.
    _receiver: Option<Receiver>,
}

impl AgentProcess {
    /// Starts the agent on node-a and waits until it is ready.
    pub fn start(lab: &Lab, config: AgentConfig) -> Result<Self> {
        let native = config.xdp.as_deref() == Some(Mode::Native.as_str());
        let receiver = native.then(|| Receiver::start(lab)).transpose()?;
        let mut agent = Self {
            node: lab.node_a_shared(),
            uplinks: lab.uplinks().map(str::to_owned).collect(),
            config,
            binary: binary()?,
            pin_dir: lab.run().pin_dir(),
            admin_socket: lab.run().admin_socket(),
            state_dir: lab.dir().join("state"),
            log: lab.dir().join("agent.log"),
            process: None,
            _receiver: receiver,
        };
        agent.launch()?;
        Ok(agent)
    }

    /// SIGKILL: no chance to clean up. The programs go on working.
    pub fn kill(&mut self) -> Result<()> {
        match self.process.take() {
            Some(mut process) => process.kill(),
            None => bail!("the agent is not running"),
        }
    }

    /// SIGTERM, and waits for the end.
    pub fn stop(&mut self) -> Result<()> {
        let Some(mut process) = self.process.take() else {
            bail!("the agent is not running");
        };
        process.signal(Signal::SIGTERM)?;
        let status = process.wait(patient(PATIENCE))?;
        if !status.success() {
            bail!("the agent ended with {status}; {}", self.log_tail());
        }
        Ok(())
    }

    /// Starts the agent again with the same settings, and waits until it is ready.
    pub fn restart(&mut self) -> Result<()> {
        if self.process.is_some() {
            self.stop()?;
        }
        self.launch()
    }

    /// Runs `svc-lb` with arguments in node-a's namespace, for this agent's pins and admin socket.
    pub fn cli(&self, args: &[&str]) -> Result<Output> {
        let mut command = collected(&self.binary);
        command
            .args(args)
            .arg("--pin-dir")
            .arg(&self.pin_dir)
            .arg("--admin-socket")
            .arg(&self.admin_socket);
        self.node.start(command)?.output(patient(PATIENCE))
    }

    /// The standard output of a subcommand that must succeed.
    pub fn ask(&self, args: &[&str]) -> Result<String> {
        let output = self.cli(args)?;
        if !output.status.success() {
            bail!(
                "svc-lb {} failed: {}",
                args.join(" "),
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// A subcommand's JSON.
    pub fn dump(&self, what: &str) -> Result<serde_json::Value> {
        let text = self.ask(&["dump", what, "-o", "json"])?;
        serde_json::from_str(&text).with_context(|| format!("dump {what} prints {text:?}"))
    }

    /// Stops the agent if it runs, and removes everything from the kernel.
    pub fn detach(&mut self) -> Result<()> {
        if let Some(mut process) = self.process.take() {
            process.kill()?;
        }
        let mut command = collected(&self.binary);
        command.arg("detach").arg("--pin-dir").arg(&self.pin_dir);
        let output = self.node.start(command)?.output(patient(PATIENCE))?;
        if !output.status.success() {
            bail!(
                "svc-lb detach failed: {}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(())
    }

    /// Where programs, maps and links are pinned.
    #[must_use]
    pub fn pin_dir(&self) -> &Path {
        &self.pin_dir
    }

    /// Everything that was logged.
    pub fn log(&self) -> Result<String> {
        std::fs::read_to_string(&self.log).with_context(|| format!("read {}", self.log.display()))
    }

    /// The last lines of the log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let from = lines.len().saturating_sub(15);
        format!(
            "the log {} ends with:\n{}",
            self.log.display(),
            lines.get(from..).unwrap_or_default().join("\n")
        )
    }

    fn launch(&mut self) -> Result<()> {
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.log)
            .with_context(|| format!("open {}", self.log.display()))?;
        let mut command = Command::new(&self.binary);
        command
            .arg("run")
            .arg(self.config.source.0)
            .arg(&self.config.source.1)
            .args(self.uplinks.iter().flat_map(|name| ["--uplink", name]))
            .args(["--pod-interface", POD_INTERFACES])
            .arg("--pin-dir")
            .arg(&self.pin_dir)
            .arg("--admin-socket")
            .arg(&self.admin_socket)
            .arg("--state-dir")
            .arg(&self.state_dir)
            .args(["--node-name", NodeName::A.as_str()])
            .args(["--socket-lb", &self.config.sockets]);
        if let Some(cgroup) = self.node.cgroup()
            && !self.config.any_cgroup
        {
            command.arg("--cgroup").arg(cgroup.path());
        }
        for family in Family::BOTH {
            command.args(["--service-cidr", &SERVICES.cidr(family)]);
            command.args(["--lb-pool", &LB_POOL.cidr(family)]);
        }
        if let Some(mode) = &self.config.xdp {
            command.args(["--xdp", mode]);
        }
        command
            .args(&self.config.extra)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        self.process = Some(self.node.start(command)?);
        self.wait_ready()
    }

    /// Ready means that the admin socket answers `status`.
    fn wait_ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + patient(PATIENCE);
        loop {
            if let Some(process) = &mut self.process
                && let Some(status) = process.ended()?
            {
                self.process = None;
                bail!("the agent ended with {status}; {}", self.log_tail());
            }
            if self.admin_socket.exists() && self.cli(&["status"])?.status.success() {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!(
                    "the agent is not ready after {PATIENCE:?}; {}",
                    self.log_tail()
                );
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for AgentProcess {
    fn drop(&mut self) {
        if let Err(error) = self.detach() {
            eprintln!("lab: {error:#}");
        }
    }
}

/// The agent binary: `SVC_LB_BIN`, else the debug build of this workspace.
pub fn binary() -> Result<PathBuf> {
    let path = std::env::var_os(BINARY).map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/debug/svc-lb"),
        PathBuf::from,
    );
    path.canonicalize().with_context(|| {
        format!(
            "no agent at {}: run `cargo xtask build`, or set {BINARY}",
            path.display()
        )
    })
}
