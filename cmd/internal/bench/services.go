package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"time"
)

// Services and workloads that are only known: nobody runs them or calls them.
const (
	knownNamespace = "known"
	knownFile      = "known.yaml"
	knownNode      = "elsewhere"
)

// knownServices is the YAML of n services with a workload each, which speaks
// HBONE and has an identity of its own.
func knownServices(n int) string {
	if n == 0 {
		return ""
	}
	var b strings.Builder
	fmt.Fprintf(&b, "{apiVersion: v1, kind: Namespace, metadata: {name: %s, labels: {istio.io/dataplane-mode: ambient}}}\n", knownNamespace)
	for i := range n {
		fmt.Fprintf(&b, "---\n{apiVersion: v1, kind: Pod, metadata: {name: known-%d, namespace: %s, labels: {app: known-%[1]d}}, "+
			"spec: {nodeName: %[3]s, serviceAccountName: known-%[1]d}, status: {podIP: 100.64.%[4]d.%[5]d}}\n", i, knownNamespace, knownNode, i>>8, i&0xff)
		fmt.Fprintf(&b, "---\n{apiVersion: v1, kind: Service, metadata: {name: known-%d, namespace: %s}, "+
			"spec: {clusterIP: 10.64.%[3]d.%[4]d, selector: {app: known-%[1]d}, ports: [{port: 80, targetPort: 8080}]}}\n", i, knownNamespace, i>>8, i&0xff)
	}
	return b.String()
}

// knownTimeout bounds how long it may take until proxies know what the
// control plane was told.
const knownTimeout = 2 * time.Minute

// know makes n services and workloads known, and returns once the proxies of
// all legs know them and no others that were made up.
func (b *bench) know(ctx context.Context, n int) error {
	// The lab does not run what it does not read.
	if err := b.tell(ctx, filepath.Join(b.config, knownFile), knownServices(n)); err != nil {
		return err
	}
	limited, cancel := context.WithTimeout(ctx, knownTimeout)
	defer cancel()
	for _, l := range b.legs {
		for _, name := range l.proxies {
			node, ok := strings.CutPrefix(name, "proxy/")
			if !ok || l.missing != "" {
				continue
			}
			a, err := b.agentAt(ctx, "node/"+node) // It outlives this.
			if err == nil {
				err = awaitKnown(limited, a, n)
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// awaitKnown returns once the proxy of an agent's node knows n.
func awaitKnown(ctx context.Context, a *agent, n int) error {
	known := 0
	for {
		got, err := a.ask(ctx, order{Do: "known"}, connectTimeout)
		if err == nil {
			known = got.Known
		}
		if err == nil && known == n {
			return nil
		}
		if e := sleep(ctx, 500*time.Millisecond); e != nil {
			return fmt.Errorf("%w: %s knows %d of %d services: %v", e, a.where, known, n, err)
		}
	}
}

// dumpURL is where a proxy tells what it knows, a stock ztunnel too.
const dumpURL = "http://127.0.0.1:15000/config_dump"

// countKnown asks this node's proxy how many services and workloads it knows
// of those that the bench made up, and returns the lesser number.
func countKnown() (int, error) {
	client := http.Client{Timeout: connectTimeout}
	r, err := client.Get(dumpURL)
	if err != nil {
		return 0, fmt.Errorf("bench: %w", err)
	}
	defer r.Body.Close()
	var dump struct {
		Services, Workloads []struct{ Namespace string }
	}
	if err := json.NewDecoder(r.Body).Decode(&dump); err != nil {
		return 0, fmt.Errorf("bench: %s: %w", dumpURL, err)
	}
	services, workloads := 0, 0
	for _, s := range dump.Services {
		if s.Namespace == knownNamespace {
			services++
		}
	}
	for _, w := range dump.Workloads {
		if w.Namespace == knownNamespace {
			workloads++
		}
	}
	return min(services, workloads), nil
}

// fewServices is what many are compared with.
const fewServices = 10

// servicesTrial measures requests, and connections with one each, while few
// services and workloads are known, and while many are.
func servicesTrial(many int) trial {
	rps := func(n int) string { return fmt.Sprintf("services-%d-rps", n) }
	conns := func(n int) string { return fmt.Sprintf("services-%d-new-conns", n) }
	const rpsRatio, connsRatio = "services-rps-ratio", "services-new-conns-ratio"
	known := 0
	know := func(n int) func(context.Context, *bench) error {
		return func(ctx context.Context, b *bench) error {
			known = n
			return b.know(ctx, n)
		}
	}
	part := func(name func(int) string, o order) trial {
		return trial{rows: []row{{name: name(many)}}, load: true, measure: func(ctx context.Context, b *bench, l *leg) (map[string]float64, error) {
			got, err := b.requests(ctx, l, o)
			if err != nil {
				return nil, err
			}
			return map[string]float64{name(known): got.rate()}, nil
		}}
	}
	return trial{
		rows: []row{
			{name: rps(fewServices), unit: "1/s"}, {name: rps(many), unit: "1/s"}, {name: rpsRatio, unit: "x", alone: true},
			{name: conns(fewServices), unit: "1/s"}, {name: conns(many), unit: "1/s"}, {name: connsRatio, unit: "x", alone: true},
		},
		parts:    []trial{part(rps, order{Conns: 64}), part(conns, order{Conns: 8, Fresh: true})},
		settings: []func(context.Context, *bench) error{know(fewServices), know(many)},
		long:     true,
		stage:    &stage{leave: func(ctx context.Context, b *bench) error { return b.know(ctx, 0) }},
		adjust: func(values map[string]map[string]float64) {
			ratioOf(rpsRatio, rps(many), rps(fewServices))(values)
			ratioOf(connsRatio, conns(many), conns(fewServices))(values)
		},
	}
}

// divide sets a row to the ratio of two others, if both have a value.
func divide(values map[string]float64, row, of, by string) {
	a, ok := values[of]
	if b := values[by]; ok && b > 0 {
		values[row] = a / b
	}
}
