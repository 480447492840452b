//! One kind's list and watch, for ever.

use futures::{Stream, StreamExt as _, stream};
use kube::{
    Api, Client,
    runtime::watcher::{self, Event, watcher},
};

use super::{
    GONE,
    object::{Arrived, Content, Watched},
    pause::{self, Pause},
};
use crate::model::Kind;

/// What a kind's watch reports.
#[derive(Debug)]
pub(super) struct News {
    pub(super) kind: Kind,
    pub(super) what: What,
}

#[derive(Debug)]
pub(super) enum What {
    /// A list begins.
    Begun,
    /// An object of the list.
    Listed(Content),
    /// The list is complete.
    Complete,
    /// An object is new or has changed.
    Applied(Content),
    /// An object is gone.
    Deleted(Content),
    /// It does not work at the moment; it is tried again.
    Failed(watcher::Error),
}

/// Lists and watches, and waits after failures. Never ends.
pub(super) fn watch<K: Watched>(client: Client, config: watcher::Config) -> impl Stream<Item = News>
where
    Arrived<K>: kube::Resource<DynamicType = ()>,
{
    let api: Api<Arrived<K>> = Api::all(client);
    let begin = move || watcher(api.clone(), config.clone()).boxed();
    let state = Watch {
        events: begin(),
        begin,
        pause: Pause::default(),
        failed: None,
    };
    stream::unfold(state, |mut state| async move {
        let what = state.next().await?;
        let kind = K::KIND;
        Some((News { kind, what }, state))
    })
}

struct Watch<S, B> {
    events: S,
    /// Begins with a list.
    begin: B,
    pause: Pause,
    /// What was reported last, to be waited for.
    failed: Option<Failed>,
}

struct Failed {
    wait: std::time::Duration,
    /// The watch cannot go on where it was.
    gone: bool,
}

impl<S, K, B> Watch<S, B>
where
    S: Stream<Item = watcher::Result<Event<Arrived<K>>>> + Unpin,
    B: Fn() -> S,
{
    async fn next(&mut self) -> Option<What> {
        if let Some(Failed { wait, gone }) = self.failed.take() {
            tokio::time::sleep(wait).await;
            if gone {
                self.events = (self.begin)();
            }
        }
        let event = match self.events.next().await? {
            Ok(event) => event,
            Err(error) => {
                let status = pause::status(&error);
                self.failed = Some(Failed {
                    gone: status.is_some_and(|status| status.code == GONE),
                    wait: self.pause.after(&error),
                });
                return Some(What::Failed(error));
            }
        };
        // The first events of a list come whether or not it can be had to its end.
        if !matches!(event, Event::Init | Event::InitApply(_)) {
            self.pause.reset();
        }
        Some(match event {
            Event::Init => What::Begun,
            Event::InitApply(object) => What::Listed(object.content),
            Event::InitDone => What::Complete,
            Event::Apply(object) => What::Applied(object.content),
            Event::Delete(object) => What::Deleted(object.content),
        })
    }
}
