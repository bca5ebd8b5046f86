package e2e

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ztun/ztun/deploy/e2e/chart"
	"github.com/ztun/ztun/deploy/e2e/cluster"
	"github.com/ztun/ztun/deploy/e2e/table"
)

// world is the cluster that all cases share; each keeps to a namespace of its own.
var world *cluster.Cluster

func TestMain(m *testing.M) {
	prepared, inside := cluster.Role()
	flag.Parse()
	if f := flag.Lookup("test.list"); f != nil && f.Value.String() != "" {
		os.Exit(m.Run())
	}
	var code int
	var err error
	if inside {
		code, err = withCluster(m, prepared)
	} else {
		code, err = enclosed()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = max(code, 1)
	}
	os.Exit(code)
}

// enclosed prepares, and runs this program again where everything it makes ends with it.
func enclosed() (int, error) {
	if err := cluster.Needs(); err != nil {
		return 1, fmt.Errorf("e2e: %w", err)
	}
	module, err := os.Getwd()
	if err != nil {
		return 1, err
	}
	modes, err := cluster.Modes(os.Getenv("MODE"))
	if err != nil {
		return 1, err
	}
	logs := filepath.Join(module, "../../bin/e2e")
	prepared, err := cluster.Prepare(context.Background(), module, logs, modes)
	if err != nil {
		return 1, err
	}
	code, err := cluster.Enclose(prepared)
	if code != 0 || err != nil {
		fmt.Fprintf(os.Stderr, "e2e: logs of every component are in %s\n", logs)
	}
	return code, err
}

func withCluster(m *testing.M, p cluster.Prepared) (int, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	var err error
	if world, err = cluster.Up(ctx, p); err != nil {
		return 1, err
	}
	begin := time.Now()
	code := m.Run()
	if err := world.KeepLogs(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	results.Print(os.Stdout, time.Since(begin))
	wanted, err := selected()
	if err != nil {
		return code, err
	}
	return code, results.Incomplete(wanted, os.Getenv("CI") == "true")
}

// selected are the names of the cases that -run asks for: this program lists them.
func selected() ([]string, error) {
	pattern := "."
	if f := flag.Lookup("test.run"); f != nil && f.Value.String() != "" {
		pattern, _, _ = strings.Cut(f.Value.String(), "/")
	}
	out, err := cluster.Itself(context.Background(), "-test.list="+pattern)
	if err != nil {
		return nil, fmt.Errorf("e2e: the cases that -run=%s selects: %w", pattern, err)
	}
	return slices.DeleteFunc(strings.Fields(out), func(s string) bool { return !strings.HasPrefix(s, "Test") }), nil
}

// results is what a run says at its end: a row for each case.
var results table.Table

// claim is the first line of each case: what it shows, for the table. The
// context ends with the case, at the latest after ten minutes.
func claim(t *testing.T, text string) context.Context {
	t.Helper()
	begin := time.Now()
	fmt.Printf("    %s\n", text)
	ctx, cancel := context.WithTimeoutCause(t.Context(), 10*time.Minute, fmt.Errorf("case %s takes too long", t.Name()))
	t.Cleanup(func() {
		cancel()
		result := table.OK
		switch {
		case t.Failed():
			result = table.Failed
		case t.Skipped():
			result = table.Skipped
		}
		results.Add(table.Row{Test: t.Name(), Claim: text, Result: result, Took: time.Since(begin)})
	})
	return ctx
}

// applied is the chart, given to the cluster once.
var applied = sync.OnceValue(func() error {
	ctx, cancel := context.WithTimeoutCause(context.Background(), time.Minute, errors.New("after a minute"))
	defer cancel()
	text, err := chartText()
	if err != nil {
		return err
	}
	return world.Apply(ctx, text)
})

// installed is the chart with both DaemonSets ready on every node, waited for once.
var installed = sync.OnceValue(func() error {
	if err := applied(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(context.Background(), time.Minute, errors.New("after a minute"))
	defer cancel()
	return errors.Join(world.Rolled(ctx, system, agentName), world.Rolled(ctx, system, proxyName))
})

const (
	system    = "istio-system"
	proxyName = "ztunnel"
	agentName = "istio-cni-node"
)

func chartText() (string, error) {
	name, tag, _ := strings.Cut(cluster.ZtunImage, ":")
	manifests, err := chart.Manifests("../chart", chart.Options{Values: map[string]any{
		"image": name, "tag": tag, "imagePullPolicy": "Never",
		"resources": map[string]any{"requests": map[string]any{"cpu": "10m", "memory": "64Mi"}},
		"cni":       map[string]any{"resources": map[string]any{"requests": map[string]any{"cpu": "10m", "memory": "32Mi"}}},
	}})
	if err != nil {
		return "", err
	}
	var out strings.Builder
	for _, m := range manifests {
		out.WriteString(m.YAML + "\n---\n")
	}
	return out.String(), nil
}

// mesh waits until the chart is installed, or fails the case.
func mesh(t *testing.T) {
	t.Helper()
	if err := installed(); err != nil {
		t.Fatalf("the chart is not installed: %v", err)
	}
}
