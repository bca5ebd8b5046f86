package control

import (
	"context"
	"errors"
	"net"
	"time"
)

// Server serves one directory to the proxies of a mesh.
type Server struct{ cfg Config }

// New prepares a server: it makes or opens the state, and reads the directory
// once. A directory with problems is no error; its report is in Status.
func New(cfg Config) (*Server, error) { return nil, errors.New("control: not built yet") }

// Serve answers on l, which it closes, until ctx ends; then it returns nil.
// All its goroutines have ended when it returns. It may be called once.
func (s *Server) Serve(ctx context.Context, l net.Listener) error { return nil }

// Reload reads the directory now, and returns once the result is in force.
func (s *Server) Reload(ctx context.Context) (Report, error) { return Report{}, nil }

// World returns what is served, nil before the first good state.
func (s *Server) World() *World { return nil }

// Token returns a node token: what a proxy of that node must present. It is a
// secret. A ttl of 0 means 12 hours.
func (s *Server) Token(node string, ttl time.Duration) (string, error) { return "", nil }

// RootPEM returns the roots that proxies must trust, as PEM.
func (s *Server) RootPEM() []byte { return nil }

// Status returns what is in force and who listens.
func (s *Server) Status() Status { return Status{} }

// Status is a server as seen from outside.
type Status struct {
	Last    Report // the latest reading
	Serving Report // the reading that is in force; zero before the first good one
	Clients []Client
	Nacks   []Nack // the latest ones, oldest first
}

// Client is one ADS stream.
type Client struct {
	Node, NodeID, Remote string
	Since, TokenExpires  time.Time
	// Sent and Acked count responses by short type name (Address, Authorization).
	Sent, Acked, Nacked map[string]uint64
}

// Nack is a response that a proxy could not use all of.
type Nack struct {
	At                  time.Time
	Node, Type, Message string
}
