//! The Stream calls: lists of any length in messages of bounded size, each made when the client is ready for
//! it.

use std::pin::Pin;

use futures_util::stream::{self, StreamExt as _};
use prost::Message;
use tokio_stream::Stream;
use tonic::Status;

use super::code;
use crate::pod::PodError;

/// The most objects in one message.
const MOST: usize = 500;
/// Messages are closed before they grow beyond this; one larger object goes alone. The least that clients
/// accept by default is 4 MiB.
const LARGEST: usize = 1 << 20;
/// Objects whose answers must be measured are measured in groups of this size.
const GROUP: usize = 64;

/// The answer of a Stream call.
pub type Batches<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Messages made of objects that are there at once.
pub fn of<T, R>(
    objects: impl Iterator<Item = T> + Send + 'static,
    message: fn(Vec<T>) -> R,
) -> Batches<R>
where
    T: Message + 'static,
    R: Send + 'static,
{
    let batches = Batcher {
        objects,
        ahead: None,
    };
    Box::pin(stream::iter(batches.map(move |batch| Ok(message(batch)))))
}

/// Messages made of objects that are measured group by group, as the client reads.
pub fn measured<S, T, R, F>(
    subjects: Vec<S>,
    measure: impl Fn(Vec<S>) -> F + Send + 'static,
    message: fn(Vec<T>) -> R,
) -> Batches<R>
where
    S: Send + Sync + Clone + 'static,
    T: Message + 'static,
    R: Send + 'static,
    F: Future<Output = Result<Vec<T>, PodError>> + Send + 'static,
{
    let groups: Vec<Vec<S>> = subjects.chunks(GROUP).map(<[S]>::to_vec).collect();
    let parts = stream::iter(groups).then(move |group| {
        let answer = measure(group);
        async move {
            match answer.await {
                Ok(objects) => of(objects.into_iter(), message),
                Err(error) => {
                    let failed = Err(code::status(&error));
                    Box::pin(stream::iter([failed])) as Batches<R>
                }
            }
        }
    });
    Box::pin(parts.flatten())
}

/// Cuts a list into batches that are bounded in number and in bytes.
struct Batcher<I: Iterator> {
    objects: I,
    /// What did not fit into the last batch.
    ahead: Option<I::Item>,
}

impl<I> Iterator for Batcher<I>
where
    I: Iterator,
    I::Item: Message,
{
    type Item = Vec<I::Item>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut batch = Vec::new();
        let mut bytes = 0;
        while let Some(object) = self.ahead.take().or_else(|| self.objects.next()) {
            bytes += object.encoded_len();
            if !batch.is_empty() && (batch.len() == MOST || bytes > LARGEST) {
                self.ahead = Some(object);
                break;
            }
            batch.push(object);
        }
        (!batch.is_empty()).then_some(batch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    async fn lengths<T: Message + Default>(stream: Batches<Vec<T>>) -> Vec<usize> {
        let all: Vec<_> = stream.collect().await;
        all.into_iter().map(|batch| batch.unwrap().len()).collect()
    }

    #[tokio::test]
    async fn batches_are_bounded_in_number_and_in_bytes() {
        let same: fn(Vec<String>) -> Vec<String> = |batch| batch;
        assert!(lengths(of(std::iter::empty(), same)).await.is_empty());
        let small = (0..1201).map(|n| n.to_string());
        assert_eq!(lengths(of(small, same)).await, [500, 500, 201]);
        let sizes = [400_000, 400_000, 400_000, 5_000_000, 1];
        let large = sizes.into_iter().map(|n| "x".repeat(n));
        assert_eq!(lengths(of(large, same)).await, [2, 1, 1, 1]);
    }

    #[tokio::test]
    async fn nothing_is_made_before_it_is_asked_for() {
        static MADE: AtomicUsize = AtomicUsize::new(0);
        let same: fn(Vec<String>) -> Vec<String> = |batch| batch;
        let objects = (0..10_000).map(|n| {
            MADE.fetch_add(1, Ordering::Relaxed);
            n.to_string()
        });
        let mut stream = of(objects, same);
        stream.next().await.unwrap().unwrap();
        assert!(MADE.load(Ordering::Relaxed) <= MOST + 1);
    }

    #[tokio::test]
    async fn what_is_measured_comes_in_order_and_a_failure_ends_up_with_the_client() {
        let same: fn(Vec<String>) -> Vec<String> = |batch| batch;
        let measure = |group: Vec<usize>| async move {
            match group.first() {
                Some(64) => Err(PodError::Invalid("no".into())),
                _ => Ok(group.iter().map(ToString::to_string).collect::<Vec<_>>()),
            }
        };
        let all: Vec<_> = measured((0..150).collect(), measure, same).collect().await;
        assert_eq!(all.len(), 3);
        assert_eq!(all[0].as_ref().unwrap().len(), 64);
        assert_eq!(
            all[1].as_ref().unwrap_err().code(),
            tonic::Code::InvalidArgument
        );
        assert_eq!(all[2].as_ref().unwrap()[0], "128");
    }
}
