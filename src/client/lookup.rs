//! Finding what an id, the beginning of an id, or a name on the command line means.
use slipway_proto::cri::*;

use crate::connection::Cri;
use crate::error::ClientError;

/// What an id stands for.
#[derive(Debug)]
pub enum Found {
    /// A container.
    Container(Container),
    /// A pod.
    Pod(PodSandbox),
    /// An image.
    Image(Image),
}

/// Which kinds a command takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kinds {
    /// Containers only.
    Containers,
    /// Pods only.
    Pods,
    /// Containers and pods.
    Both,
    /// These and images.
    All,
}

impl Kinds {
    fn phrase(self) -> &'static str {
        match self {
            Kinds::Containers => "container",
            Kinds::Pods => "pod",
            Kinds::Both => "container or pod",
            Kinds::All => "container, pod or image",
        }
    }
}

/// All pods.
///
/// # Errors
/// [`ClientError::Rpc`].
pub async fn pods(cri: &Cri) -> Result<Vec<PodSandbox>, ClientError> {
    let response = cri
        .list_pod_sandbox(ListPodSandboxRequest { filter: None })
        .await?;
    Ok(response.items)
}

/// All containers.
///
/// # Errors
/// [`ClientError::Rpc`].
pub async fn containers(cri: &Cri) -> Result<Vec<Container>, ClientError> {
    let response = cri
        .list_containers(ListContainersRequest { filter: None })
        .await?;
    Ok(response.containers)
}

/// Finds the one object that `id` means: a whole id wins over a name, a name over an id's beginning, and a
/// container over a pod of the same name.
///
/// # Errors
/// [`ClientError::NotFound`], [`ClientError::Ambiguous`], or what the runtime answers.
pub async fn find(cri: &Cri, id: &str, kinds: Kinds) -> Result<Found, ClientError> {
    let mut matches: Vec<(Match, Found)> = Vec::new();
    if kinds != Kinds::Pods {
        for container in containers(cri).await? {
            let name = container.metadata.as_ref().map_or("", |m| &m.name);
            if let Some(rank) = Match::of(id, &container.id, name) {
                matches.push((rank, Found::Container(container)));
            }
        }
    }
    if kinds != Kinds::Containers {
        for pod in pods(cri).await? {
            let name = pod.metadata.as_ref().map_or("", |m| &m.name);
            if let Some(rank) = Match::of(id, &pod.id, name) {
                matches.push((rank, Found::Pod(pod)));
            }
        }
    }
    if kinds == Kinds::All && !matches.iter().any(|(rank, _)| *rank == Match::Id) {
        let image = Some(ImageSpec {
            image: id.to_owned(),
            ..Default::default()
        });
        // A runtime may refuse text that is no reference; then it is no image's name either.
        let status = cri
            .image_status(ImageStatusRequest {
                image,
                verbose: false,
            })
            .await;
        if let Ok(ImageStatusResponse {
            image: Some(image), ..
        }) = status
        {
            matches.push((Match::Name, Found::Image(image)));
        }
    }
    best(matches, id, kinds)
}

fn best(matches: Vec<(Match, Found)>, id: &str, kinds: Kinds) -> Result<Found, ClientError> {
    let Some(rank) = matches.iter().map(|(rank, _)| *rank).min() else {
        return Err(ClientError::NotFound {
            kinds: kinds.phrase(),
            id: id.to_owned(),
        });
    };
    let mut best: Vec<Found> = matches
        .into_iter()
        .filter(|(r, _)| *r == rank)
        .map(|(_, found)| found)
        .collect();
    // A pod and its only container may bear one name, as `slipway run` gives it: the container is meant.
    let container = |found: &Found| matches!(found, Found::Container(_));
    if rank == Match::Name && best.iter().filter(|found| container(found)).count() == 1 {
        best.retain(container);
    }
    match (best.pop(), best.len()) {
        (Some(found), 0) => Ok(found),
        (_, more) => Err(ClientError::Ambiguous {
            id: id.to_owned(),
            count: more + 1,
        }),
    }
}

/// Finds a container.
///
/// # Errors
/// As [`find`].
pub async fn container(cri: &Cri, id: &str) -> Result<Container, ClientError> {
    match find(cri, id, Kinds::Containers).await? {
        Found::Container(container) => Ok(container),
        _ => Err(ClientError::NotFound {
            kinds: "container",
            id: id.to_owned(),
        }),
    }
}

/// How well an id fits, best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Match {
    Id,
    Name,
    Prefix,
}

impl Match {
    fn of(wanted: &str, id: &str, name: &str) -> Option<Match> {
        match () {
            () if wanted.is_empty() => None,
            () if wanted == id => Some(Match::Id),
            () if wanted == name => Some(Match::Name),
            () if id.starts_with(wanted) => Some(Match::Prefix),
            () => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_closest_match_wins() {
        assert_eq!(Match::of("abc", "abc", "abc"), Some(Match::Id));
        assert_eq!(Match::of("web", "abc", "web"), Some(Match::Name));
        assert_eq!(Match::of("ab", "abc", "web"), Some(Match::Prefix));
        assert_eq!(Match::of("", "abc", ""), None);
        assert_eq!(Match::of("we", "abc", "web"), None);
        let pod = |id: &str| {
            Found::Pod(PodSandbox {
                id: id.into(),
                ..Default::default()
            })
        };
        let found = best(
            vec![(Match::Prefix, pod("a1")), (Match::Name, pod("b"))],
            "a",
            Kinds::Both,
        );
        assert!(matches!(found, Ok(Found::Pod(p)) if p.id == "b"));
        let both = || {
            let container = Container {
                id: "c".into(),
                ..Default::default()
            };
            vec![
                (Match::Name, Found::Container(container)),
                (Match::Name, pod("p")),
            ]
        };
        let found = best(both(), "web", Kinds::Both);
        assert!(matches!(found, Ok(Found::Container(_))));
        let mut three = both();
        three.extend(both());
        assert!(matches!(
            best(three, "web", Kinds::Both),
            Err(ClientError::Ambiguous { count: 4, .. })
        ));
        let two = vec![(Match::Prefix, pod("a1")), (Match::Prefix, pod("a2"))];
        assert!(matches!(
            best(two, "a", Kinds::Both),
            Err(ClientError::Ambiguous { count: 2, .. })
        ));
        assert!(matches!(
            best(vec![], "a", Kinds::Both),
            Err(ClientError::NotFound { .. })
        ));
    }
}
