//! One-time tokens: what a streaming URL carries instead of the request.

use crate::StreamError;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use parking_lot::Mutex;
use std::collections::{HashMap, VecDeque};
use std::time::Duration;
use tokio::time::Instant;

/// Random bytes of a token: 192 bits.
const TOKEN_BYTES: usize = 24;

/// Requests that wait for their client, by token.
pub(crate) struct Tokens<T> {
    ttl: Duration,
    limit: usize,
    waiting: Mutex<Waiting<T>>,
}

struct Waiting<T> {
    requests: HashMap<String, (Instant, T)>,
    /// Tokens in the order in which they lapse; one that was used may still be here.
    order: VecDeque<(Instant, String)>,
}

impl<T> Tokens<T> {
    pub(crate) fn new(ttl: Duration, limit: usize) -> Self {
        Self {
            ttl,
            limit,
            waiting: Mutex::new(Waiting {
                requests: HashMap::new(),
                order: VecDeque::new(),
            }),
        }
    }

    /// Keeps a request and gives the token that fetches it.
    pub(crate) fn insert(&self, request: T) -> Result<String, StreamError> {
        let mut random = [0; TOKEN_BYTES];
        getrandom::fill(&mut random).map_err(StreamError::Random)?;
        let token = URL_SAFE_NO_PAD.encode(random);
        let now = Instant::now();
        let mut waiting = self.waiting.lock();
        waiting.drop_stale(now);
        if waiting.requests.len() >= self.limit {
            return Err(StreamError::TooManyInFlight(self.limit));
        }
        let until = now + self.ttl;
        waiting.order.push_back((until, token.clone()));
        waiting.requests.insert(token.clone(), (until, request));
        Ok(token)
    }

    /// Takes a request: a token works once. `None` if it is unknown, was used, or is too old.
    pub(crate) fn take(&self, token: &str) -> Option<T> {
        let mut waiting = self.waiting.lock();
        let now = Instant::now();
        let (until, request) = waiting.requests.remove(token)?;
        waiting.drop_stale(now);
        (now < until).then_some(request)
    }
}

impl<T> Waiting<T> {
    /// Forgets what has lapsed, and used tokens at the front of the order.
    fn drop_stale(&mut self, now: Instant) {
        while let Some((until, token)) = self.order.front() {
            if *until > now && self.requests.contains_key(token) {
                break;
            }
            if let Some((_, token)) = self.order.pop_front() {
                self.requests.remove(&token);
            }
        }
        // A used token behind an unused one stays in the order until its time; don't let many gather.
        if self.order.len() > 2 * self.requests.len() + 64 {
            let requests = &self.requests;
            self.order.retain(|(_, token)| requests.contains_key(token));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_token_works_once_and_for_its_time() {
        let tokens = Tokens::new(Duration::from_secs(60), 3);
        let token = tokens.insert(7).unwrap();
        assert!(token.len() >= 22, "{token}");
        assert_eq!(tokens.take("other"), None);
        assert_eq!(tokens.take(&token), Some(7));
        assert_eq!(tokens.take(&token), None);
        let token = tokens.insert(8).unwrap();
        tokio::time::advance(Duration::from_secs(59)).await;
        let late = tokens.insert(9).unwrap();
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(tokens.take(&token), None);
        assert_eq!(tokens.take(&late), Some(9));
    }

    #[tokio::test(start_paused = true)]
    async fn tokens_are_bounded_and_used_ones_make_room() {
        let tokens = Tokens::new(Duration::from_secs(60), 2);
        let first = tokens.insert(1).unwrap();
        tokens.insert(2).unwrap();
        assert!(matches!(
            tokens.insert(3),
            Err(StreamError::TooManyInFlight(2))
        ));
        tokens.take(&first).unwrap();
        tokens.insert(3).unwrap();
        tokio::time::advance(Duration::from_secs(60)).await;
        for _ in 0..1000 {
            let token = tokens.insert(4).unwrap();
            let kept = tokens.insert(5).unwrap();
            tokens.take(&kept).unwrap();
            tokens.take(&token).unwrap();
        }
        assert!(tokens.waiting.lock().order.len() <= 64);
        let oldest = tokens.insert(6).unwrap();
        for _ in 0..1000 {
            let token = tokens.insert(7).unwrap();
            tokens.take(&token).unwrap();
        }
        assert!(tokens.waiting.lock().order.len() <= 70);
        assert_eq!(tokens.take(&oldest), Some(6));
    }
}
