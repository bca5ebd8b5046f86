package main

import (
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"time"
)

// body is what the server answers every request with.
const body = "sixty-four bytes of an answer, as small as answers usually are.\n"

// serve is the server of a pod: an ordinary HTTP server of Go's library, as
// an app would have it, one for streams, and one that never reads.
func (w *worker) serve() error {
	requests, err := net.Listen("tcp4", fmt.Sprintf(":%d", portHTTP))
	if err != nil {
		return fmt.Errorf("bench: %w", err)
	}
	bulk, err := net.Listen("tcp4", fmt.Sprintf(":%d", portStream))
	if err != nil {
		requests.Close()
		return fmt.Errorf("bench: %w", err)
	}
	stalled, err := net.Listen("tcp4", fmt.Sprintf(":%d", portStall))
	if err != nil {
		requests.Close()
		bulk.Close()
		return fmt.Errorf("bench: %w", err)
	}
	go serveHTTP(requests)
	go w.streams.serve(bulk)
	go stallReader(stalled)
	return nil
}

func serveHTTP(l net.Listener) {
	s := &http.Server{
		Handler:           http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, body) }),
		ReadHeaderTimeout: time.Minute,
		ErrorLog:          log.New(io.Discard, "", 0),
	}
	s.Serve(l)
}
