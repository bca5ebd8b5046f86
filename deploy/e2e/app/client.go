package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
)

// Answer is what came of one attempt. Error is empty when it went well.
type Answer struct {
	Status int    `json:"status,omitempty"` // of HTTP
	Seen   Seen   `json:"seen"`
	Error  string `json:"error,omitempty"`
	Millis int64  `json:"millis"`
}

// attempt times f and keeps its error as text.
func attempt(f func(a *Answer) error) Answer {
	var a Answer
	start := time.Now()
	if err := f(&a); err != nil {
		a.Error = err.Error()
	}
	a.Millis = time.Since(start).Milliseconds()
	return a
}

// freshClient makes a connection for each request, like most that fail first in a restart.
func freshClient(timeout time.Duration, keep bool) *http.Client {
	return &http.Client{Timeout: timeout, Transport: &http.Transport{DisableKeepAlives: !keep, MaxIdleConnsPerHost: 1}}
}

func get(ctx context.Context, url string, timeout time.Duration) Answer {
	return ask(ctx, freshClient(timeout, false), url)
}

func ask(ctx context.Context, client *http.Client, url string) Answer {
	return attempt(func(a *Answer) error {
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return err
		}
		resp, err := client.Do(r)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		a.Status = resp.StatusCode
		body, err := io.ReadAll(io.LimitReader(resp.Body, maxRequestBody))
		if err != nil {
			return err
		}
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("status %d: %s", resp.StatusCode, body)
		}
		return json.Unmarshal(body, &a.Seen)
	})
}

// dial connects from a port, or from any if it is 0.
func dial(ctx context.Context, address string, source int, timeout time.Duration) (net.Conn, error) {
	d := net.Dialer{Timeout: timeout}
	if source != 0 {
		d.LocalAddr = &net.TCPAddr{Port: source}
	}
	return d.DialContext(ctx, "tcp", address)
}

func banner(ctx context.Context, address string, timeout time.Duration, source int) Answer {
	return attempt(func(a *Answer) error {
		c, err := dial(ctx, address, source, timeout)
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(timeout))
		line, err := bufio.NewReader(c).ReadBytes('\n')
		if err != nil {
			return err
		}
		return json.Unmarshal(line, &a.Seen)
	})
}

func health(ctx context.Context, address string, timeout time.Duration) Answer {
	return attempt(func(*Answer) error {
		ctx, cancel := context.WithTimeout(ctx, timeout)
		defer cancel()
		c, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return err
		}
		defer c.Close()
		r, err := grpc_health_v1.NewHealthClient(c).Check(ctx, &grpc_health_v1.HealthCheckRequest{})
		if err == nil && r.Status != grpc_health_v1.HealthCheckResponse_SERVING {
			err = fmt.Errorf("health is %v", r.Status)
		}
		return err
	})
}

// Echoed counts what one long connection carried there and back.
type Echoed struct {
	Bytes   int64  `json:"bytes"`
	Rounds  int    `json:"rounds"`
	Longest int64  `json:"longest_ms"` // the slowest round
	Error   string `json:"error,omitempty"`
}

// echo sends random blocks on one connection and wants each back unchanged.
// It prints "open" once the first is back, so that a test knows when to begin.
func echo(ctx context.Context, address string, source int, lasts, timeout time.Duration) (e Echoed) {
	err := func() error {
		c, err := dial(ctx, address, source, timeout)
		if err != nil {
			return err
		}
		defer c.Close()
		end := time.Now().Add(lasts)
		sent, back := make([]byte, 4096), make([]byte, 4096)
		for time.Now().Before(end) && ctx.Err() == nil {
			_, _ = rand.Read(sent)
			start := time.Now()
			_ = c.SetDeadline(start.Add(timeout))
			if _, err := c.Write(sent); err != nil {
				return err
			}
			if _, err := io.ReadFull(c, back); err != nil {
				return err
			}
			if want, got := sha256.Sum256(sent), sha256.Sum256(back); !bytes.Equal(want[:], got[:]) {
				return fmt.Errorf("round %d came back changed", e.Rounds)
			}
			e.Bytes += int64(len(sent))
			e.Longest = max(e.Longest, time.Since(start).Milliseconds())
			if e.Rounds++; e.Rounds == 1 {
				fmt.Println("open")
			}
			time.Sleep(20 * time.Millisecond)
		}
		return nil
	}()
	if err != nil {
		e.Error = err.Error()
	}
	return e
}

type loadConfig struct {
	Rate    int
	For     time.Duration
	Keep    bool
	Timeout time.Duration
}

// Loaded counts every request: Sent = OK + the sum of Errors.
type Loaded struct {
	Sent    int            `json:"sent"`
	OK      int            `json:"ok"`
	Hosts   map[string]int `json:"hosts"` // OK, by the pod that answered
	Longest int64          `json:"longest_ms"`
	Errors  map[string]int `json:"errors,omitempty"`
}

// load sends at a steady rate, whether or not answers come back. It prints
// "open" once the first is back.
func load(ctx context.Context, url string, cfg loadConfig) Loaded {
	var (
		mu      sync.Mutex
		l       = Loaded{Hosts: map[string]int{}, Errors: map[string]int{}}
		pending sync.WaitGroup
		client  = freshClient(cfg.Timeout, cfg.Keep)
		tick    = time.NewTicker(time.Second / time.Duration(cfg.Rate))
		end     = time.Now().Add(cfg.For)
	)
	defer tick.Stop()
	for time.Now().Before(end) && ctx.Err() == nil {
		<-tick.C
		l.Sent++
		pending.Add(1)
		go func() {
			defer pending.Done()
			a := ask(context.WithoutCancel(ctx), client, url)
			mu.Lock()
			defer mu.Unlock()
			l.Longest = max(l.Longest, a.Millis)
			if a.Error != "" {
				l.Errors[a.Error]++
				return
			}
			l.Hosts[a.Seen.Host]++
			if l.OK++; l.OK == 1 {
				fmt.Println("open")
			}
		}()
	}
	pending.Wait()
	return l
}
