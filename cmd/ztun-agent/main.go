// Ztun-agent is the privileged half of a node: it decides by Kubernetes which
// pods are in the mesh, attaches them to TUN devices, and hands those to the
// node's proxies. It installs the CNI plugin that holds each new pod until it
// is captured.
//
// It is set up by the environment variables of Istio's node agent; package
// config has the list. The order of a start, which clients depend on:
//
//  1. configuration, logs, health (not ready), metrics
//  2. what the container must have (needs_linux.go)
//  3. the proxies' socket, which nobody accepts yet; the plugin's socket; the
//     stand-in for kubelets' probes
//  4. Kubernetes: what is on this node, and what an earlier agent did to it
//  5. proxies are accepted: none is served before its pods are known
//  6. ready, but for the plugin, which is installed last
//
// A stop is in stop.go: an agent that is replaced leaves everything as it is,
// pods captured and new ones waiting; one that is uninstalled cleans up.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/ztun/ztun/cmd/internal/config"
)

// release is set when a release is linked.
var release = "unknown"

func main() {
	if err := newCommand().ExecuteContext(context.Background()); err != nil {
		fmt.Fprintf(os.Stderr, "ztun-agent: %s\n", oneLine(err))
		os.Exit(1)
	}
}

func newCommand() *cobra.Command {
	return &cobra.Command{
		Use:           "ztun-agent",
		Short:         "The node agent of ztun; its settings are environment variables",
		Version:       release,
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := config.LoadAgent(config.Process())
			if err != nil {
				return err
			}
			stop, cancel := signal.NotifyContext(cmd.Context(), syscall.SIGTERM, syscall.SIGINT)
			defer cancel()
			return run(stop, cfg, newLog(cfg))
		},
	}
}

func newLog(cfg *config.Agent) *slog.Logger {
	o := &slog.HandlerOptions{Level: cfg.LogLevel}
	if cfg.LogJSON {
		return slog.New(slog.NewJSONHandler(os.Stdout, o))
	}
	return slog.New(slog.NewTextHandler(os.Stdout, o))
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
