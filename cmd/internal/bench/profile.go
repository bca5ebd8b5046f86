package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/ztun/ztun/cmd/internal/lab"
)

// adminURL is where a proxy serves profiles, from inside its node.
const adminURL = "http://127.0.0.1:15000/debug/pprof/profile?seconds=%d"

// profile takes a CPU profile of each of a leg's ztun proxies while a trial
// of load runs, in the first round. The returned function waits for them.
func (b *bench) profile(ctx context.Context, t trial, l *leg, round int) (wait func() error) {
	if b.Profile == "" || round > 0 || !t.load || l.other {
		return func() error { return nil }
	}
	var all sync.WaitGroup
	errs := make([]error, len(l.proxies))
	for i, name := range l.proxies {
		node, ok := strings.CutPrefix(name, "proxy/")
		if !ok {
			continue
		}
		all.Go(func() {
			file := filepath.Join(b.Profile, fmt.Sprintf("%s.%s.%s.pb.gz", t.name(), l.name, node))
			errs[i] = b.takeProfile(ctx, node, file)
		})
	}
	return func() error {
		all.Wait()
		return errors.Join(errs...)
	}
}

func (b *bench) takeProfile(ctx context.Context, node, file string) error {
	out, err := os.Create(file)
	if err != nil {
		return fmt.Errorf("bench: profile: %w", err)
	}
	defer out.Close()
	seconds := int(math.Ceil(b.Window.Seconds()))
	code, err := b.site.Exec(ctx, "node/"+node, []string{b.program, "fetch", fmt.Sprintf(adminURL, seconds)}, lab.Stdio{Out: out, Err: os.Stderr})
	if err == nil && code != 0 {
		err = fmt.Errorf("bench: profile of %s: exit code %d", node, code)
	}
	return errors.Join(err, out.Close())
}

// fetch writes what a URL answers to out.
func fetch(url string, out io.Writer) error {
	client := http.Client{Timeout: maxWindow + time.Minute}
	r, err := client.Get(url)
	if err != nil {
		return fmt.Errorf("bench: %w", err)
	}
	defer r.Body.Close()
	if r.StatusCode != http.StatusOK {
		return fmt.Errorf("bench: %s: %s", url, r.Status)
	}
	if _, err := io.Copy(out, r.Body); err != nil {
		return fmt.Errorf("bench: %s: %w", url, err)
	}
	return nil
}
