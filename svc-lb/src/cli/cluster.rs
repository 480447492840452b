//! Arguments that name a cluster to watch.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{ArgAction, ValueEnum};
use http::Uri;

use crate::source::kubernetes::{Access, Settings};

/// Where the cluster's state comes from, where it is a cluster's.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Cluster")]
pub(super) struct ClusterArgs {
    /// Watch the cluster's API server. The default with --kubeconfig, and in a pod of a cluster unless
    /// --manifests or --stream is given
    #[arg(
        long,
        value_name = "SOURCE",
        env = "SVC_LB_SOURCE",
        value_enum,
        conflicts_with_all = ["manifests", "stream"]
    )]
    source: Option<Source>,
    /// Credentials for the API server, as kubectl's [default: the service account of the pod]
    #[arg(
        long,
        value_name = "FILE",
        env = "SVC_LB_KUBECONFIG",
        conflicts_with_all = ["manifests", "stream"]
    )]
    kubeconfig: Option<PathBuf>,
    /// Where the API server answers, in place of the address that the kubeconfig or the pod knows; more
    /// than one are tried in turn. An address that does not depend on Services: they are what is to be
    /// programmed
    #[arg(
        long,
        value_name = "URL",
        env = "SVC_LB_API_SERVER",
        value_delimiter = ',',
        value_parser = server,
        action = ArgAction::Append
    )]
    api_server: Vec<Uri>,
    /// How lists are had: in pages, or as streams (streaming lists, Kubernetes 1.34), which cost the API
    /// server less
    #[arg(
        long,
        value_name = "HOW",
        env = "SVC_LB_API_LIST",
        value_enum,
        default_value_t
    )]
    api_list: ApiList,
}

/// `--source`.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Source {
    /// Lists and watches of the API server.
    Kubernetes,
}

/// `--api-list`.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
enum ApiList {
    /// In pages.
    #[default]
    Pages,
    /// As streams.
    Stream,
}

fn server(text: &str) -> Result<Uri> {
    let uri: Uri = text.parse()?;
    if !matches!(uri.scheme_str(), Some("https" | "http")) || uri.host().is_none() {
        bail!("an address such as https://192.0.2.1:6443");
    }
    Ok(uri)
}

impl ClusterArgs {
    /// What to watch; nothing where other sources are given, or there is no cluster at hand.
    pub(super) fn settings(
        self,
        others: bool,
        node_name: &str,
        proxy_name: Option<&str>,
    ) -> Option<Settings> {
        let Self {
            source,
            kubeconfig,
            api_server,
            api_list,
        } = self;
        let wanted = source.is_some() || kubeconfig.is_some();
        if !wanted && (others || !Access::in_cluster()) {
            return None;
        }
        Some(Settings {
            access: Access {
                kubeconfig,
                servers: api_server,
            },
            node_name: node_name.to_owned(),
            proxy_name: proxy_name.map(str::to_owned),
            streaming_lists: api_list == ApiList::Stream,
        })
    }
}
