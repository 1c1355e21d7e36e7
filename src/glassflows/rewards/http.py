"""Requests to a service that may be slow, busy, restarted or wrong: asked again, some at a time."""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit, urlunsplit

_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
_LONGEST = 60.0  # seconds between two attempts, whatever a service asks for


class RemoteRewardError(RuntimeError):
    """A service did not answer well, as often as it was asked.

    Attributes:
        status: Status of its last answer; None where there was none.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


def check_whole(name: str, number: Any, least: int) -> None:
    """Raise ValueError unless an option is a whole number of at least so much."""
    if not isinstance(number, int) or isinstance(number, bool) or number < least:
        raise ValueError(f"{name}: expected a whole number from {least}, got {number!r}")


class _Bad(Exception):
    """An answer that is none.

    Args:
        reason: What is wrong.
        wait: Seconds after which the service asks to be asked again; None where it does not say.
        status: Its status.
        final: Whether it would be no better the next time.
    """

    def __init__(
        self,
        reason: str,
        wait: float | None = None,
        status: int | None = None,
        final: bool = False,
    ) -> None:
        super().__init__(reason)
        self.wait = wait
        self.status = status
        self.final = final


class _Slots:
    """As many requests as may be under way; a copy of them is a new one."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._free = threading.BoundedSemaphore(number)

    def __enter__(self) -> None:
        self._free.acquire()

    def __exit__(self, *error: object) -> None:
        self._free.release()

    def __reduce__(self) -> tuple[type[_Slots], tuple[int]]:
        return _Slots, (self.number,)


class Service:
    """An address that is asked by JSON and answers by JSON.

    An attempt fails if there is no connection, no answer in time, half an answer, one that cannot
    be read, or a status 408, 409, 425, 429, 500, 502, 503 or 504. After a failure the next attempt
    waits `backoff` · 2^i seconds and up to a quarter less, or longer if the service asks for it by
    Retry-After, but at most a minute. Any other status ends it, that of a redirection included.

    Args:
        url: Its address.
        timeout: Seconds to wait for a connection, and for each piece of an answer.
        retries: Attempts after the first.
        backoff: Seconds before the second attempt.
        concurrency: Requests under way at a time, of all threads.
        headers: Sent with each request, such as {"Authorization": "Bearer …"}; shown nowhere.
        owner: Name of the reward, for messages.

    Raises:
        ValueError: if an option is out of range.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float,
        retries: int,
        backoff: float,
        concurrency: int,
        headers: Mapping[str, str] | None,
        owner: str,
    ) -> None:
        if urlsplit(url).scheme not in ("http", "https"):
            raise ValueError(f"url: expected one that begins with http:// or https://, got {url!r}")
        check_whole("retries", retries, 0)
        check_whole("concurrency", concurrency, 1)
        if not timeout > 0 or not backoff >= 0:
            raise ValueError(
                f"timeout, backoff: expected positive seconds, got {timeout!r} and {backoff!r}"
            )
        self.url = url
        self.timeout = timeout
        self.retries = retries
        self.backoff = backoff
        self.headers = dict(headers or {})
        self.owner = owner
        self._slots = _Slots(concurrency)

    @property
    def shown(self) -> str:
        """The address without a user's name, a password and a query, any of which may be secret."""
        parts = urlsplit(self.url)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))

    def _address(self, path: str) -> str:
        """Return the address with a path appended, before its query."""
        parts = urlsplit(self.url)
        return urlunsplit(parts._replace(path=parts.path.rstrip("/") + path, fragment=""))

    def every(self, bodies: Sequence[Any], read: Callable[[Any], Any], path: str = "") -> list[Any]:
        """Return what is read from the answers to some requests, in their order.

        Args:
            bodies: What is posted.
            read: Reads an answer, parsed; raises ValueError, LookupError or TypeError if it cannot.
            path: Appended to the address.

        Raises:
            RemoteRewardError: if one of them is not answered well.
        """
        stop, found = threading.Event(), queue.SimpleQueue[tuple[int, Any, BaseException | None]]()
        waiting = queue.SimpleQueue[int]()
        for i in range(len(bodies)):
            waiting.put(i)

        def work() -> None:
            while not stop.is_set():
                try:
                    i = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    found.put((i, self._persist(path, bodies[i], read, stop), None))
                except BaseException as error:
                    found.put((i, None, error))

        # daemons, for which an interpreter that is told to end does not wait
        for _ in range(min(self._slots.number, len(bodies))):
            threading.Thread(target=work, name="glassflows request", daemon=True).start()
        answers: dict[int, Any] = {}
        try:
            while len(answers) < len(bodies):
                i, answer, error = found.get()
                if error is not None:
                    raise error
                answers[i] = answer
        finally:  # an error, or Ctrl-C, does not wait for the rest
            stop.set()
        return [answers[i] for i in range(len(bodies))]

    def get(self, read: Callable[[Any], Any], path: str = "") -> Any:
        """Return what is read from the answer to a request that posts nothing.

        Raises:
            RemoteRewardError: if it is not answered well.
        """
        return self._persist(path, None, read, threading.Event())

    def _persist(
        self, path: str, body: Any, read: Callable[[Any], Any], stop: threading.Event
    ) -> Any:
        """Ask until there is a good answer."""
        attempts = 0
        while True:
            try:
                with self._slots:
                    if stop.is_set():  # while it waited
                        raise _Bad("it was stopped", final=True)
                    return _read(self._answer(path, body), read)
            except _Bad as bad:
                last = bad
            wait = self.backoff * 2**attempts * (1 - random.SystemRandom().random() / 4)
            wait = min(_LONGEST, max(wait, last.wait or 0.0))
            attempts += 1
            if last.final or attempts > self.retries or stop.wait(wait):
                break
        times = "once" if attempts == 1 else f"{attempts} times"
        raise RemoteRewardError(
            f"{self.owner}: {self.shown}{path} was asked {times} and did not answer well: {last}",
            last.status,
        )

    def _authorised(self, request: Any) -> Any:
        """Return a request with the name and password of the address, and none of ~/.netrc."""
        from requests.auth import HTTPBasicAuth
        from requests.utils import get_auth_from_url

        user, password = get_auth_from_url(self.url)
        if user and "Authorization" not in request.headers:
            return HTTPBasicAuth(user, password)(request)
        return request

    def _answer(self, path: str, body: Any) -> Any:
        """Ask once; exceptions of requests, which may tell the whole address, go no further."""
        import requests

        try:
            return requests.request(
                "GET" if body is None else "POST",
                self._address(path),
                json=body,
                headers=self.headers,
                timeout=self.timeout,
                auth=self._authorised,
                allow_redirects=False,  # which would send the headers elsewhere
            )
        except requests.Timeout:
            raise _Bad(f"no answer within {self.timeout:g} s") from None
        except (
            requests.exceptions.ChunkedEncodingError,
            requests.exceptions.ContentDecodingError,
        ):
            raise _Bad("the answer broke off") from None
        except requests.ConnectionError:
            raise _Bad("no connection, or it broke off") from None
        except (requests.RequestException, ValueError) as error:  # of the address or a header
            raise _Bad(
                f"no such request can be made ({type(error).__name__})", final=True
            ) from None


def _read(answer: Any, read: Callable[[Any], Any]) -> Any:
    """Return what is read from an answer.

    Raises:
        _Bad: if it is none.
    """
    status, text = answer.status_code, answer.text[:200]
    if answer.is_redirect:
        raise _Bad(
            f"status {status}, it is elsewhere: name the address that it redirects to", final=True
        )
    if status != 200:
        wait = _seconds(answer.headers.get("Retry-After"))
        raise _Bad(f"status {status}, {text!r}", wait, status, final=status not in _AGAIN)
    try:
        return read(answer.json())
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        reason = f"an answer that cannot be read ({error}): {text!r}"
    raise _Bad(reason, status=status)


def _seconds(text: str | None) -> float | None:
    """Return what Retry-After asks for; None for a date or nothing."""
    try:
        return max(0.0, float(text or ""))
    except ValueError:
        return None
