package main

import (
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// body is what the server answers every request with.
const body = "sixty-four bytes of an answer, as small as answers usually are.\n"

// serve is the server of a pod: an ordinary HTTP server of Go's library, as
// an app would have it, and one for streams.
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
	go serveHTTP(requests)
	go w.streams.serve(bulk)
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

// streamBuffer is the size of one read or write on a stream, in bytes.
const streamBuffer = 128 << 10

// streams are connections that carry as much as they can, in one direction.
type streams struct {
	received atomic.Uint64 // Bytes.

	mu sync.Mutex
	// mu guards the fields below.
	conns []net.Conn
}

// The first byte of a stream says who sends.
const (
	clientSends = 'u'
	serverSends = 'd'
)

func (s *streams) serve(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			direction := make([]byte, 1)
			if _, err := io.ReadFull(c, direction); err != nil {
				return
			}
			if direction[0] == serverSends {
				send(c)
			} else {
				s.receive(c)
			}
		}()
	}
}

// open opens streams to a server and starts to fill or drain them.
func (s *streams) open(o order) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.conns) > 0 {
		return errors.New("bench: streams are open already")
	}
	for range o.Conns {
		c, err := net.DialTimeout("tcp4", netip.AddrPortFrom(o.Addr.Addr(), portStream).String(), connectTimeout)
		if err != nil {
			s.closeLocked()
			return fmt.Errorf("bench: open stream: %w", err)
		}
		s.conns = append(s.conns, c)
		direction := byte(clientSends)
		if o.Down {
			direction = serverSends
		}
		if _, err := c.Write([]byte{direction}); err != nil {
			s.closeLocked()
			return fmt.Errorf("bench: open stream: %w", err)
		}
	}
	for _, c := range s.conns {
		if o.Down {
			go s.receive(c)
		} else {
			go send(c)
		}
	}
	return nil
}

func (s *streams) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closeLocked()
}

func (s *streams) closeLocked() {
	for _, c := range s.conns {
		c.Close()
	}
	s.conns = nil
}

// send writes until the connection ends.
func send(c net.Conn) {
	b := make([]byte, streamBuffer)
	for {
		if _, err := c.Write(b); err != nil {
			return
		}
	}
}

// receive reads until the connection ends, and counts.
func (s *streams) receive(c net.Conn) {
	b := make([]byte, streamBuffer)
	for {
		n, err := c.Read(b)
		s.received.Add(uint64(n))
		if err != nil {
			return
		}
	}
}
