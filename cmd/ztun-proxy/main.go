// Ztun-proxy is the data plane of one node: it terminates the TCP of the
// node's pods on TUN devices that the node agent hands to it, and carries it as
// HBONE to other pods. It holds those descriptors and the pods' certificates,
// and no privilege: see privileges_linux.go.
//
// It is set up by ztunnel's environment variables and files; package config has
// the list. The order of a start:
//
//  1. privileges away (privileges_linux.go), configuration, logs
//  2. readiness, engine, certificates, control plane (proxy.go)
//  3. admin and metrics
//  4. once the control plane has told the whole mesh: the agent's socket; each
//     pod it names becomes a stack and a tunnel.Pod (pods.go)
//
// and of a stop: no new pods, connections until the deadline, then everything in
// the reverse order (stop.go). A later proxy takes the pods over, or has before:
// this one serves its old connections on, and what it would read of them comes
// from that one (netstack/handover.go). While there is none, this one takes new
// connections as well.
package main

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"

	"github.com/ztun/ztun/cmd/internal/config"
)

const usage = `usage: ztun-proxy [proxy [ARG...] | version | help]

  proxy    run (also without any argument); what follows is only recorded
  version  print the version
  help     print this

The settings are ztunnel's environment variables, such as XDS_ADDRESS,
CA_ADDRESS, NODE_NAME, INPOD_UDS, RUST_LOG.
`

func main() { os.Exit(command(os.Args[1:])) }

func command(args []string) int {
	verb := "proxy"
	if len(args) > 0 {
		verb = args[0]
	}
	switch verb {
	case "proxy":
		if err := start(); err != nil {
			fmt.Fprintf(os.Stderr, "ztun-proxy: %s\n", oneLine(err))
			return 1
		}
		return 0
	case "version":
		fmt.Println(version())
		return 0
	case "help":
		fmt.Print(usage)
		return 0
	}
	fmt.Fprint(os.Stderr, usage)
	return 1
}

// start runs the proxy until it is told to stop.
func start() error {
	if err := dropPrivileges(); err != nil {
		return err
	}
	cfg, err := config.Load(config.Process())
	if err != nil {
		return err
	}
	// Readers wait outside the scheduler; two more keep the rest alive.
	if n := cfg.Readers + 2; runtime.GOMAXPROCS(0) < n {
		runtime.GOMAXPROCS(n)
	}
	return run(cfg)
}

// oneLine joins what errors.Join put on lines of their own.
func oneLine(err error) string {
	var joined interface{ Unwrap() []error }
	if errors.As(err, &joined) {
		var parts []string
		for _, e := range joined.Unwrap() {
			parts = append(parts, oneLine(e))
		}
		return strings.Join(parts, "; ")
	}
	return strings.ReplaceAll(err.Error(), "\n", "; ")
}
