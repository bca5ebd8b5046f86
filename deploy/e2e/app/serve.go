package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sync/atomic"

	"google.golang.org/grpc"
	grpchealth "google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
)

// The servers' ports; probes have their own, so that their traffic can be told apart.
const (
	httpPort       = ":8080" // says who asked: see Seen
	echoPort       = ":9000" // sends back what it gets
	firstPort      = ":9001" // says who asked, before it is told anything
	grpcPort       = ":9002" // grpc.health.v1
	httpProbePort  = ":8081"
	tcpProbePort   = ":9003"
	grpcProbePort  = ":9004"
	maxRequestBody = 1 << 20
)

// Seen is what a server saw of its client.
type Seen struct {
	Host string `json:"host"` // the server's pod
	Peer string `json:"peer"` // the client's address and port, as the server saw it
	Hits int64  `json:"hits"` // requests of this server so far
}

func serve(ctx context.Context) error {
	host, _ := os.Hostname()
	var hits atomic.Int64
	ask := func(peer string) Seen { return Seen{Host: host, Peer: peer, Hits: hits.Add(1)} }
	ends := make(chan error, 8)
	web := func(port string, h http.HandlerFunc) {
		ends <- fmt.Errorf("http on %s: %w", port, http.ListenAndServe(port, h))
	}
	go web(httpPort, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, io.LimitReader(r.Body, maxRequestBody))
		_ = json.NewEncoder(w).Encode(ask(r.RemoteAddr))
	})
	go web(httpProbePort, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok\n") })
	raw := func(port string, handle func(net.Conn)) {
		ends <- fmt.Errorf("tcp on %s: %w", port, accept(port, handle))
	}
	go raw(echoPort, func(c net.Conn) { _, _ = io.Copy(c, c) })
	go raw(firstPort, func(c net.Conn) {
		_ = json.NewEncoder(c).Encode(ask(c.RemoteAddr().String()))
		_, _ = io.Copy(io.Discard, c)
	})
	go raw(tcpProbePort, func(net.Conn) {})
	go func() { ends <- fmt.Errorf("grpc on %s: %w", grpcPort, serveGRPC(grpcPort)) }()
	go func() { ends <- fmt.Errorf("grpc on %s: %w", grpcProbePort, serveGRPC(grpcProbePort)) }()
	select {
	case err := <-ends:
		return err
	case <-ctx.Done():
		return nil
	}
}

// accept serves each connection on a goroutine and closes it after handle.
func accept(port string, handle func(net.Conn)) error {
	l, err := net.Listen("tcp", port)
	if err != nil {
		return err
	}
	for {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return err
		}
		if err != nil {
			continue
		}
		go func() {
			defer c.Close()
			handle(c)
		}()
	}
}

func serveGRPC(port string) error {
	l, err := net.Listen("tcp", port)
	if err != nil {
		return err
	}
	s := grpc.NewServer()
	grpc_health_v1.RegisterHealthServer(s, grpchealth.NewServer())
	return s.Serve(l)
}
